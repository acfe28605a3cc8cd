"""Tables and pictures of a run, from nothing but the files in its directory."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from rich.console import Console, RenderableType

from selconv_jax._utils.files import write_atomically
from selconv_jax.analysis._layer_counts import LayerCounts, count_layers
from selconv_jax.data._catalog import find_known
from selconv_jax.errors import ConfigError
from selconv_jax.functional._damage import channel_scores, expected_channel_damage, normalize_damage
from selconv_jax.report._channel_map import channel_map
from selconv_jax.report._curves import learning_curves
from selconv_jax.report._layer_allocation import LayerAllocation
from selconv_jax.report._overview import allocation_overview
from selconv_jax.report._page import RoundOfRun, run_page
from selconv_jax.report._style import save_figure
from selconv_jax.report._tables import count_table, layer_table, run_table
from selconv_jax.train._checkpoints.checkpoint import CheckpointStore
from selconv_jax.train._config import Config
from selconv_jax.train._metrics import read_metrics
from selconv_jax.train._network import bucket_program, make_network
from selconv_jax.train._round_log import read_rounds
from selconv_jax.train._workdir import CHECKPOINTS, METRICS, ROUNDS, read_config
from selconv_jax.transforms._capacity import required_capacity
from selconv_jax.transforms._layer_tree import layer_states

_HEADING = "parameters and multiply-adds"
_FORMS = ("plain", "selective", "compact")


def print_run(workdir: Path, console: Console) -> None:
    """Print the tables of a run: its epochs, its layers, their parameters and multiply-adds."""
    config = read_config(workdir)
    records = read_metrics(workdir / METRICS)
    if not records:
        console.print(f"{workdir}: no epoch has ended yet", highlight=False, soft_wrap=True)
        return
    console.print(run_table(records, _summary(workdir, config)))
    with console.status("reading the checkpoint"):
        _, variables = _variables(workdir)
        layers = _layers(variables)
    if layers:
        console.print(layer_table(layers))
    with console.status("counting parameters and multiply-adds"):
        title, counts = _run_counts(config, variables)
    table: RenderableType = f"{_HEADING}: {counts}"
    if not isinstance(counts, str):
        table = count_table(counts, title, _FORMS if variables.get("selectivity") else ("plain",))
    console.print(table, highlight=False)


def write_page(workdir: Path, file: Path, console: Console) -> None:
    """Write the page of a run, see `run_page`.

    Raises:
        ConfigError: No epoch has ended yet.
        OSError: The file cannot be written.
    """
    config = read_config(workdir)
    records = read_metrics(workdir / METRICS)
    if not records:
        raise ConfigError(f"{workdir}: no epoch has ended yet, so there is nothing to show on a page.")
    with console.status("making the page"):
        step, variables = _variables(workdir)
        layers = _layers(variables)
        rounds = [
            RoundOfRun(each.step, *_of_round(each.layers, layers)) for each in read_rounds(workdir / ROUNDS)
        ]
        if layers and not rounds:  # of a run without a round so far
            rounds = [RoundOfRun(step, layers, {layer.name: [] for layer in layers})]
        _, counts = _run_counts(config, variables)
        title = f"{workdir.resolve().name}: {_title(config)}"
        write_atomically(file, run_page(title, _summary(workdir, config), records, rounds, counts))
    console.print(f"page in {file}", highlight=False, soft_wrap=True)


def _of_round(
    arrays: Mapping[str, Mapping[str, Any]], now: Sequence[LayerAllocation]
) -> tuple[list[LayerAllocation], dict[str, list[int]]]:
    """Return the layers after a round, in forward order, and the slots of each that it closed."""
    features = {layer.name: layer.features for layer in now}
    names = sorted(arrays, key=_forward)
    layers = [
        LayerAllocation(
            name=name,
            gate=arrays[name]["gate"],
            source=arrays[name].get("source"),
            shift=arrays[name].get("shift"),
            score=None,
            features=features.get(name, 0),
        )
        for name in names
    ]
    return layers, {name: np.flatnonzero(arrays[name]["deallocated"]).tolist() for name in names}


def _run_counts(config: Config, variables: Mapping[str, Any]) -> tuple[str, Sequence[LayerCounts] | str]:
    """Count parameters and multiply-adds of a run's network by layer, or say why not; with a title.

    Nothing is compiled, and no image is read: the name of the data set determines the image shape.
    """
    known = find_known(config.data.name)
    if not variables:
        return "", "not counted, as there is no checkpoint"
    if known is None:
        name = config.data.name
        return "", f"not counted, as the size of the images of {name} is in none of the run's files"
    network = make_network(config.model, known.image_shape, known.num_classes)
    needed = required_capacity(variables) if variables.get("selectivity") else 0.0
    model = bucket_program(network, needed).model
    image = jax.ShapeDtypeStruct((1, *known.image_shape), model.dtype)
    size = "x".join(map(str, known.image_shape))
    title = f"{_HEADING} (in millions) per image of {size}"
    if variables.get("selectivity"):
        copies = f"copies in up to {model.capacity:.1%} of a layer's channels"
        title += f"; selective: as compiled for {copies if model.capacity else 'no copies'}"
    return title, count_layers(model, variables, image)


def draw_run(workdir: Path, output: Path, console: Console) -> None:
    """Draw learning curves and channel maps as PNG files in the folder ``output``."""
    config = read_config(workdir)
    records = read_metrics(workdir / METRICS)
    if not records:
        return
    title = _title(config)
    console.print("drawing pictures")
    output.mkdir(parents=True, exist_ok=True)
    with console.status("learning curves") as status:
        save_figure(learning_curves(records, title), output / "learning_curves.png")
        step, variables = _variables(workdir)
        layers = _layers(variables)
        if layers:
            save_figure(allocation_overview(layers, f"{title}, step {step:,}"), output / "allocation.png")
        for number, layer in enumerate(layers, 1):
            status.update(f"channel map {number} of {len(layers)}")
            picture = channel_map(layer, f"{workdir.resolve().name}: {title}, step {step:,}")
            save_figure(picture, output / f"channels_{layer.name.replace('/', '_')}.png")
    what = "learning curves" + (f", allocation and {len(layers)} channel maps" if layers else "")
    console.print(f"pictures in {output}: {what}", highlight=False, soft_wrap=True)


def _title(config: Config) -> str:
    return f"{config.model.name} ({config.model.variant}) on {config.data.name}"


def _summary(workdir: Path, config: Config) -> dict[str, str]:
    return {
        "run": str(workdir),
        "model": f"{config.model.name}, {config.model.variant}, {config.model.dtype}",
        "data": ", ".join([config.data.name, *_splits(config)]),
        "epochs": str(config.epochs),
        "batch size": str(config.batch_size),
        "seed": str(config.seed),
        "threshold": f"{config.allocation.threshold:g}",
    }


def _splits(config: Config) -> list[str]:
    """List the splits that differ from the data set's defaults."""
    keys = ("train_split", "validation_split", "test_split", "validation")
    named = {key.replace("_", " "): getattr(config.data, key) for key in keys}
    return [f"{key} {value}" for key, value in named.items() if value is not None]


def _variables(workdir: Path) -> tuple[int, dict[str, Any]]:
    """Read step and variables of the newest intact checkpoint; 0 and empty if there is none yet."""
    with CheckpointStore(workdir / CHECKPOINTS) as store:
        if not store.steps():
            return 0, {}
        step, arrays = store.read()
    tree = traverse_util.unflatten_dict({tuple(name.split("/")): leaf for name, leaf in arrays.items()})
    return step, {name: tree[name] for name in ("params", "batch_stats", "selectivity") if name in tree}


def _layers(variables: dict[str, Any]) -> list[LayerAllocation]:
    """Collect the selective and gate-only layers."""
    if not variables.get("selectivity"):
        return []
    layers = []
    for name, state in sorted(layer_states(variables).items(), key=lambda item: _forward(item[0])):
        damage = expected_channel_damage(state.kernel, state.scale, state.bias, state.gate)
        layers.append(
            LayerAllocation(
                name=name,
                gate=np.asarray(state.gate),
                source=None if state.source is None else np.asarray(state.source),
                shift=None if state.shift is None else np.asarray(state.shift),
                score=np.asarray(channel_scores(normalize_damage(damage), None)),
                features=state.kernel.shape[-1],
            )
        )
    return layers


def _forward(name: str) -> tuple[int, list[tuple[int, str]]]:
    """Make a sort key of layers that gives the order in which the networks call them.

    Those of a block come after one another, ``transition1`` before ``block2``, ``layer2`` before ``layer10``.
    """
    words = "".join(character if character.isdigit() else f" {character} " for character in name).split()
    parts = [(int(word), "") if word.isdigit() else (0, word) for word in words]
    return next((number for number, text in parts if not text), 0), parts
