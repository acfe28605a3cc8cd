"""Segment the foreground of noisy images of clothes with a U-Net of selective layers.

The pictures are the Fashion-MNIST sample that comes with the package; the task is made by this script: noise
is added, and the mask of the pixels that were not black is to be found. Run it with

    python experiments/composition/unet.py --steps 30
"""

import argparse
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import selconv_jax
from selconv_jax import AllocationRule, SelectiveConv
from selconv_jax.data import load

Variables = Mapping[str, Any]

# The published threshold of 1e-3 is for hundreds of epochs; a run of seconds needs a larger one.
ALLOCATION = AllocationRule(threshold=0.15)


class UNet(nn.Module):
    """Two levels down, two up, with skip connections between levels of the same size."""

    width: int = 8

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Map images ``[N, H, W, C]`` to logits of the foreground ``[N, H, W]``."""
        skips = []
        x = nn.Conv(self.width, (3, 3))(images)
        for level in (1, 2):
            x = SelectiveConv(self.width * level, (3, 3), name=f"down{level}")(x, train)
            skips.append(x)
            x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        x = SelectiveConv(self.width * 4, (3, 3), name="bottom")(x, train)
        for level in (2, 1):
            skip = skips.pop()
            x = jax.image.resize(x, (*skip.shape[:-1], x.shape[-1]), "nearest")
            # A copy may read a channel of the skip connection: the layer sees one input.
            x = jnp.concatenate([x, skip], axis=-1)
            x = SelectiveConv(self.width * level, (3, 3), name=f"up{level}")(x, train)
        return nn.Conv(1, (1, 1))(nn.relu(x))[..., 0]


def make_batch(images: np.ndarray, seed: int, size: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Make noisy images ``[size, 28, 28, 1]`` float32 and their masks ``[size, 28, 28]`` float32."""
    rng = np.random.default_rng(seed)
    clean = images[rng.integers(len(images), size=size)] / 255
    noisy = clean + rng.normal(scale=0.3, size=clean.shape)
    return noisy.astype(np.float32), (clean[..., 0] > 0.05).astype(np.float32)


def train(steps: int) -> tuple[nn.Module, Variables, jax.Array, list[float], list[selconv_jax.Report]]:
    """Train the network; return it, its variables, an example input, and the history."""
    data = load("fashion_mnist_sample").train.images
    model, optimizer = UNet(), optax.adam(1e-2)
    images, _ = make_batch(data, seed=0)
    variables = jax.jit(lambda key: model.init(key, images, train=False))(jax.random.key(0))
    opt_state = optimizer.init(variables["params"])

    @jax.jit
    def step_of(
        variables: Variables, opt_state: optax.OptState, images: jax.Array, masks: jax.Array
    ) -> tuple[Variables, optax.OptState, jax.Array]:
        def loss_of(params: Variables) -> tuple[jax.Array, Variables]:
            logits, updates = model.apply(
                {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
            )
            return optax.sigmoid_binary_cross_entropy(logits, masks).mean(), updates

        (loss, updates), gradients = jax.value_and_grad(loss_of, has_aux=True)(variables["params"])
        changes, opt_state = optimizer.update(gradients, opt_state, variables["params"])
        params = optax.apply_updates(variables["params"], changes)
        return {**variables, **updates, "params": params}, opt_state, loss

    losses, reports = [], []
    every = max(1, steps // 6)
    for step in range(steps):
        variables, opt_state, loss = step_of(variables, opt_state, *make_batch(data, seed=step))
        losses.append(float(loss))
        if (step + 1) % every == 0:
            print(f"step {step + 1}: loss {loss:.3f}")
        if (step + 1) % every == 0 and step < steps // 2:
            key = jax.random.fold_in(jax.random.key(1), step)
            variables, report = selconv_jax.reallocate(variables, key, ALLOCATION)
            print(
                f"  de-allocated {report.deallocated}, re-allocated {report.reallocated} "
                f"of {report.channels} channels"
            )
            reports.append(report)
    return model, variables, jnp.asarray(images), losses, reports


def main() -> None:
    """Read the number of steps, train, and print how well the masks of test images are found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    model, variables, *_ = train(parser.parse_args().steps)
    images, masks = make_batch(load("fashion_mnist_sample").test.images, seed=0, size=256)
    found = jax.jit(lambda images: model.apply(variables, images, train=False) > 0)(images)
    overlap = np.sum(found & (masks > 0)) / np.sum(found | (masks > 0))
    print(f"overlap of found and true masks of test images (intersection over union): {overlap:.1%}")


if __name__ == "__main__":
    main()
