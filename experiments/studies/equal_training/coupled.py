"""Train with the numbers that the authors' program was given too, in float64, and compare the losses.

    python experiments/studies/equal_training/coupled.py [--steps N] [--dump FILE]

Nothing is left to chance: the initial values (those of this project's seed 0), the cropped images of every
batch and the sources and shifts of every round are the same here and there. The other side's numbers are in
``coupled.json``; a whole training puts ours beside them. ``--dump`` writes what the other side was given.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

from selconv_jax import functional, layer_states
from selconv_jax.data import load
from selconv_jax.data._augment import crop_and_flip
from selconv_jax.functional._allocation import sources_from_uniform
from selconv_jax.interop.torch import state_dict
from selconv_jax.train import Trainer, load_config
from selconv_jax.train._network import make_network
from selconv_jax.train._optimizer import make_optimizer
from selconv_jax.transforms._layer_tree import merge_layers

STUDY = Path(__file__).resolve().parent
FILE = "coupled.json"
CONFIG = load_config(STUDY / "selective.toml")
DATA = load("fashion_mnist_sample")
STEPS = len(DATA.train) // CONFIG.batch_size
EVALUATED = 250
Variables = dict[str, Any]


def batches(epoch: int) -> Iterator[tuple[jax.Array, NDArray[np.int32]]]:
    """Yield the cropped images ``[B, H, W, C]`` uint8 and labels ``[B]`` of every step of an epoch."""
    rng = np.random.default_rng([0, epoch])
    order = rng.permutation(len(DATA.train))
    padding = DATA.info.crop_padding
    top, left = rng.integers(0, 2 * padding + 1, (2, len(order)))
    mirrored = rng.random(len(order)) < 0.5
    for step in range(STEPS):
        part = slice(step * CONFIG.batch_size, (step + 1) * CONFIG.batch_size)
        images = jnp.asarray(DATA.train.images[order[part]])
        offsets = jnp.asarray(top[part]), jnp.asarray(left[part]), jnp.asarray(mirrored[part])
        yield crop_and_flip(images, *offsets, crop_padding=padding), DATA.train.labels[order[part]]


def draws(epoch: int, layer: int, channels: int) -> NDArray[np.float64]:
    """Draw uniform numbers ``[C, 3]`` in [0, 1): for a slot's source, and for its shift in (row, column).

    Args:
        epoch: The epoch after which the round is.
        layer: Number of the layer, from the input to the output.
        channels: Channels that it reads.
    """
    return np.random.default_rng([1, epoch, layer]).random((channels, 3))


def round_of_allocation(variables: Variables, epoch: int) -> Variables:
    """De-allocate and re-allocate every layer with the numbers of `draws`."""
    rule = CONFIG.allocation
    states = {}
    for layer, (path, state) in enumerate(layer_states(variables).items()):
        gate, source = functional.deallocate(_damage(state), state.gate, state.source, rule.threshold)
        state = dataclasses.replace(state, gate=gate, source=source)
        if source is not None:
            uniform = jnp.asarray(draws(epoch, layer, len(gate)))
            scores = functional.channel_scores(_damage(state), source, rule.max_copies)
            drawn = sources_from_uniform(uniform[:, 0], scores, gate, rule.top_k)
            state = functional.fill_slots(state, drawn, rule.shift_range * (2 * uniform[:, 1:] - 1))
        states[path] = state
    return merge_layers(variables, states)


def _damage(state: functional.LayerState) -> jax.Array:
    damage = functional.expected_channel_damage(state.kernel, state.scale, state.bias, state.gate)
    return functional.normalize_damage(damage)


def initial_variables() -> Variables:
    """Draw the initial values of seed 0, and return them in float64."""
    with jax.enable_x64(False):
        config = dataclasses.replace(CONFIG, seed=0, devices=1)
        variables = Trainer(config, DATA).initial_state().variables
    return jax.tree.map(
        lambda leaf: leaf.astype(np.float64) if leaf.dtype == np.float32 else leaf, jax.device_get(variables)
    )


def train(steps: int) -> dict[str, list[Any]]:
    """Train for a number of steps, in float64.

    Args:
        steps: Steps.

    Returns:
        The loss of every step; and of every complete epoch test loss, correct answers, and the numbers of
            closed channels and of copies after its round.
    """
    info = DATA.info
    network = make_network(CONFIG.model, info.image_shape, info.num_classes)
    model = network.clone(dtype=jnp.float64, param_dtype=jnp.float64)
    optimizer = make_optimizer(CONFIG.optimizer, STEPS * CONFIG.epochs)
    entropy = optax.softmax_cross_entropy_with_integer_labels

    mean, std = (np.array(values, np.float64)[None, None, None] for values in (info.mean, info.std))

    def pixels(images: Any) -> jax.Array:
        return (images.astype(np.float64) / 255 - mean) / std

    @jax.jit
    def step(variables: Variables, opt_state: Any, images: Any, labels: Any) -> tuple[Any, Any, jax.Array]:
        def loss(params: Any) -> tuple[jax.Array, Any]:
            given = {**variables, "params": params}
            logits, changed = model.apply(given, pixels(images), train=True, mutable=["batch_stats"])
            return entropy(logits, labels).mean(), changed

        (value, changed), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        updates, opt_state = optimizer.update(grads, opt_state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return {**variables, **changed, "params": params}, opt_state, value

    evaluate = jax.jit(lambda variables, images: model.apply(variables, pixels(images), train=False))
    variables = initial_variables()
    opt_state = optimizer.init(variables["params"])
    record: dict[str, list[Any]] = {
        key: [] for key in ("loss", "test_loss", "test_correct", "closed", "copies")
    }
    for epoch in range(CONFIG.epochs):
        for images, labels in batches(epoch):
            if len(record["loss"]) == steps:
                return record
            variables, opt_state, value = step(variables, opt_state, images, labels)
            record["loss"].append(float(value))
        starts = range(0, len(DATA.test), EVALUATED)
        logits = jnp.concatenate(
            [evaluate(variables, DATA.test.images[start : start + EVALUATED]) for start in starts]
        )
        labels = DATA.test.labels
        record["test_loss"].append(float(entropy(logits, labels).mean()))
        record["test_correct"].append(int((logits.argmax(axis=1) == labels).sum()))
        if epoch < CONFIG.allocation.until * CONFIG.epochs:
            variables = round_of_allocation(variables, epoch)
        states = layer_states(variables).values()
        record["closed"].append(sum(int((~state.gate).sum()) for state in states))
        record["copies"].append(
            sum(int((state.source >= 0).sum()) for state in states if state.source is not None)
        )
    return record


def dump(file: Path) -> None:
    """Write the other side's input: initial values by its names, batches, numbers of the rounds."""
    network = make_network(CONFIG.model, DATA.info.image_shape, DATA.info.num_classes)
    variables = initial_variables()
    arrays: dict[str, Any] = {f"init/{name}": value for name, value in state_dict(network, variables).items()}
    for epoch in range(CONFIG.epochs):
        images, labels = zip(*batches(epoch), strict=True)
        arrays[f"images/{epoch}"], arrays[f"labels/{epoch}"] = np.stack(images), np.stack(labels)
        for layer, state in enumerate(layer_states(variables).values()):
            arrays[f"draws/{epoch}/{layer}"] = draws(epoch, layer, len(state.gate))
    np.savez(file, **arrays)


def relative_differences(here: Sequence[float], there: Sequence[float]) -> NDArray[np.float64]:
    """Compute the relative differences of the losses of the steps that both sides have."""
    both = min(len(here), len(there))
    return np.abs(np.array(here[:both]) / np.array(there[:both]) - 1)


def main(words: Sequence[str] | None = None) -> int:
    """Train, and print how far the losses are apart."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    whole = STEPS * CONFIG.epochs
    parser.add_argument("--steps", type=int, default=whole, help="the first steps alone; keeps no record")
    parser.add_argument("--dump", type=Path, metavar="FILE", help="write what the other side gets (.npz)")
    options = parser.parse_args(words)
    jax.config.update("jax_enable_x64", True)
    if options.dump:
        dump(options.dump)
        return 0
    record = json.loads((STUDY / FILE).read_text(encoding="utf-8"))
    record["here"] = train(options.steps)
    differences = relative_differences(record["here"]["loss"], record["there"]["loss"])
    print(f"largest relative difference of the losses of {len(differences)} steps: {differences.max():.1e}")
    if options.steps >= whole:
        text = ",\n".join(f"{json.dumps(side)}: {json.dumps(record[side])}" for side in ("here", "there"))
        (STUDY / FILE).write_text("{" + text + "}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
