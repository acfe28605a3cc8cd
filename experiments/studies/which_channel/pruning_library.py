"""Prune the trained networks of the study with Torch-Pruning, in PyTorch, from the same weights.

    python experiments/studies/which_channel/pruning_library.py [--workdir DIR]

After `run.py`, and in an environment with ``torch`` and ``torch-pruning``. The results join those of
`run.py`. Started again after an interruption, it resumes.
"""

import argparse
import copy
import functools
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch_pruning
from criteria import LIBRARY
from run import EPOCHS_ON, RATE_ON, RESULTS, SHARES, TRAINED_ON, collect
from torch import Tensor, nn
from torch.nn import functional

from selconv_jax.data import DatasetInfo, ImageData, Split
from selconv_jax.data._augment import augment, normalize
from selconv_jax.interop.torch import state_dict
from selconv_jax.train import Trainer, TrainState
from selconv_jax.train._run_setup import prepare_again, restore_run
from selconv_jax.train._workdir import read_config

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from pytorch_baseline.networks import torch_network

BATCH = 500  # of an evaluation
VERSIONS = {"torch": torch.__version__, "torch-pruning": metadata.version("torch-pruning")}


def main(arguments: Sequence[str] | None = None) -> None:
    """Prune every trained network by both criteria at every fraction, measure, and train on."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--workdir", type=Path, default=Path("runs/which_channel"))
    options = parser.parse_args(arguments)
    path = options.workdir / RESULTS
    if not path.is_file():
        parser.error(
            f"{path} does not exist. Let run.py, beside this file, make it first, or pass --workdir."
        )
    collect(options.workdir, pruned)


def pruned(directory: Path, done: set[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """Yield the results of a trained network for every criterion and fraction not done yet.

    Args:
        directory: Of the run of the plain network.
        done: Network, seed, criterion and fraction of the existing rows.
    """
    plain = read_config(directory)
    points = [(criterion, share) for criterion in LIBRARY for share in SHARES if share]
    points = [point for point in points if (plain.model.name, plain.seed, *point) not in done]
    if not points:
        return
    trainer, _, _, trained = restore_run(directory)
    _, data = prepare_again(plain)
    assert isinstance(data, ImageData)
    network = converted(trainer, trained, data)
    for criterion, share in points:
        smaller = prune(network, criterion, share, data.info.image_shape)
        row = {
            "network": plain.model.name,
            "seed": plain.seed,
            "criterion": criterion,
            "share": share,
            "versions": VERSIONS,
            **sizes(smaller, data.info.image_shape),
            **accuracies(smaller, data, ""),
        }
        if share in TRAINED_ON:
            train_on(smaller, data, plain.batch_size, plain.optimizer.momentum, plain.optimizer.weight_decay)
            row |= accuracies(smaller, data, "_trained_on")
        yield row


def converted(trainer: Trainer, state: TrainState, data: ImageData) -> nn.Module:
    """Build the trained network in PyTorch; raise an AssertionError if it has other logits."""
    network = torch_network(trainer.model, data.info.image_shape[-1])
    variables = state.variables
    arrays = state_dict(trainer.model, variables)
    network.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    images = np.array(normalize(jnp.asarray(data.test.images[:8]), data.info.mean, data.info.std))
    expected: Any = trainer.model.apply(variables, images, train=False)
    with torch.no_grad():
        found = network.eval()(channels_first(images))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)
    return network


def prune(network: nn.Module, criterion: str, share: float, image: Sequence[int]) -> nn.Module:
    """Copy a network without a fraction of the channels that its convolutions make.

    All layers are ranked together, as in `run.py`. What is added to a shortcut stays: the library does not
    follow channels through its zero padding.
    """
    network = copy.deepcopy(network).eval()
    importance = {
        LIBRARY[0]: torch_pruning.importance.MagnitudeImportance(p=1),
        LIBRARY[1]: torch_pruning.importance.BNScaleImportance(),
    }[criterion]
    kept: list[nn.Module] = [network.classifier]
    ends = [block.brc_3.conv for block in network.modules() if hasattr(block, "brc_3")]
    if ends:
        kept += [network.features.conv0, *ends]
    torch_pruning.pruner.BasePruner(
        network,
        channels_first(np.zeros((1, *image), np.float32)),
        importance=importance,
        global_pruning=True,
        pruning_ratio=share,
        ignored_layers=kept,
    ).step()
    return network


def sizes(network: nn.Module, image: Sequence[int]) -> dict[str, int]:
    """Count parameters, and the multiply-adds (MACs) of convolutions and classifier per image."""
    counts: list[int] = []

    def count(module: nn.Module, _: Any, output: Tensor) -> None:
        counts.append(module.weight[0].numel() * output.numel())

    hooks = [
        module.register_forward_hook(count)
        for module in network.modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    with torch.no_grad():
        network.eval()(channels_first(np.zeros((1, *image), np.float32)))
    for hook in hooks:
        hook.remove()
    return {
        "parameters": sum(each.numel() for each in network.parameters()),
        "multiply_adds": sum(counts),
    }


def train_on(
    network: nn.Module, data: ImageData, batch_size: int, momentum: float, weight_decay: float
) -> None:
    """Train in place as `run.py` does: the same epochs, augmentation, optimizer and cosine decay."""
    generator, key = np.random.default_rng(0), jax.random.key(0)
    prepare = jax.jit(functools.partial(_augmented, info=data.info))
    steps = len(data.train) // batch_size
    optimizer = torch.optim.SGD(
        network.parameters(), RATE_ON, momentum=momentum, weight_decay=weight_decay, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS_ON * steps)
    for _ in range(EPOCHS_ON):
        network.train()
        order = generator.permutation(len(data.train))[: steps * batch_size].reshape(steps, batch_size)
        for places in order:
            key, drawn = jax.random.split(key)
            images = np.array(prepare(drawn, data.train.images[places]))
            labels = torch.from_numpy(data.train.labels[places].astype(np.int64))
            optimizer.zero_grad(set_to_none=True)
            functional.cross_entropy(network(channels_first(images)), labels).backward()
            optimizer.step()
            schedule.step()


def _augmented(key: jax.Array, images: jax.Array, info: DatasetInfo) -> jax.Array:
    images = augment(key, images, crop_padding=info.crop_padding, flip=info.flip)
    return normalize(images, info.mean, info.std)


def accuracies(network: nn.Module, data: ImageData, suffix: str) -> dict[str, float]:
    """Compute the accuracy on the validation and the test images."""
    assert data.validation is not None
    splits = {"validation": data.validation, "test": data.test}
    return {f"{name}_accuracy{suffix}": _accuracy(network, split, data) for name, split in splits.items()}


def _accuracy(network: nn.Module, split: Split, data: ImageData) -> float:
    network.eval()
    correct = 0
    with torch.no_grad():
        for start in range(0, len(split), BATCH):
            places = slice(start, start + BATCH)
            images = np.array(normalize(jnp.asarray(split.images[places]), data.info.mean, data.info.std))
            predicted = network(channels_first(images)).argmax(dim=1).numpy()
            correct += int((predicted == split.labels[places]).sum())
    return correct / len(split)


def channels_first(images: np.ndarray) -> Tensor:
    """Convert images ``[N, H, W, C]`` to a tensor ``[N, C, H, W]``."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, 1)))


if __name__ == "__main__":
    main()
