"""From what is needed of a network to the layouts of its layers and the places of their variables."""

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selconv_jax.compaction._flow import Flow
from selconv_jax.compaction._layout import LayerLayout
from selconv_jax.compaction._liveness import Allocated, Kept
from selconv_jax.compaction._placement import KernelPlace, RowsPlace
from selconv_jax.compaction._trace import LAYER_VARIABLES, Field

__all__ = ["Place", "Reduction", "reduction"]

Place = KernelPlace | RowsPlace


@dataclasses.dataclass
class Reduction:
    """How a network and its variables become smaller.

    Attributes:
        layouts: Layout of each layer that is replaced, by path.
        widths: Outputs of each other convolution that makes fewer, by path.
        places: Where the small variables lie in the whole ones; None: they have none.
    """

    layouts: dict[str, LayerLayout] = dataclasses.field(default_factory=dict)
    widths: dict[str, int] = dataclasses.field(default_factory=dict)
    places: dict[Field, Place | None] = dataclasses.field(default_factory=dict)


def reduction(flow: Flow, layers: dict[str, Allocated], kept: Kept, selective: frozenset[str]) -> Reduction:
    """Lays out every layer that changes.

    Args:
        flow: The flow of channels.
        layers: Allocation of each layer, by path.
        kept: What is left of each.
        selective: Paths of the layers with a gate. If anything changes, they lose it.

    Returns:
        The reduction; empty if nothing is closed, nothing copied and everything needed.
    """
    result = Reduction()
    changed = {path for path in layers if not _is_whole(layers[path], kept, path)}
    narrower = {path for path in kept.outputs if path not in layers and not kept.outputs[path].all()}
    if not changed and not narrower:
        return result
    for path in layers:
        if path in changed or path in selective:
            _add_layer(result, path, layers[path], kept)
    for path in narrower:
        outputs = _numbers(kept.outputs[path])
        place = RowsPlace(len(kept.outputs[path]), outputs)
        result.widths[path] = len(outputs)
        result.places |= {("params", *_parts(path), name): place for name in ("kernel", "bias")}
    return result


def _is_whole(layer: Allocated, kept: Kept, path: str) -> bool:
    masks = (kept.inputs[path], kept.slots[path], kept.outputs[path])
    return layer.is_untouched and all(mask.all() for mask in masks)


def _add_layer(result: Reduction, path: str, layer: Allocated, kept: Kept) -> None:
    fields = {
        name: (collection, *_parts(path), name)
        for collection, names in LAYER_VARIABLES.items()
        for name in names
    }
    result.places |= dict.fromkeys(fields.values())
    inputs, outputs = kept.inputs[path], kept.outputs[path]
    arriving = int(inputs.sum())
    if not outputs.any():
        result.layouts[path] = LayerLayout(inputs=arriving, own=(), copied=(), outputs=0)
        return
    channels = len(layer.gate)
    position = np.cumsum(inputs) - 1
    live_groups = outputs.reshape(layer.groups, -1).any(axis=1)
    is_copy = kept.slots[path] & layer.gate & (layer.source >= 0)
    own = np.flatnonzero(kept.slots[path] & ~is_copy)
    copies = np.flatnonzero(is_copy)
    read = np.concatenate([own, copies])
    if len(read) == arriving and layer.groups == 1:
        # The own channels where they arrive and the copies in between, see `LayerLayout.is_in_place`.
        free = np.setdiff1d(np.arange(arriving), position[own])
        order = np.argsort(np.concatenate([position[own], free]))
    else:
        # Group by group the own channels first; without groups that is the order they are read in.
        group = np.arange(channels) // (channels // layer.groups)
        order = np.argsort(group[read], kind="stable")
    slots = read[order]
    idle = _numbers(~layer.gate[slots])
    result.layouts[path] = LayerLayout(
        inputs=arriving,
        own=_tuple(position[own]),
        copied=_tuple(position[layer.source[copies]]),
        outputs=int(outputs.sum()),
        groups=int(live_groups.sum()),
        idle=idle,
        order=() if (slots == read).all() else _tuple(order),
    )
    per_channel = RowsPlace(channels, _tuple(slots))
    result.places |= {fields[name]: per_channel for name in ("scale", "bias", "mean", "var")}
    result.places[fields["kernel"]] = KernelPlace(
        channels=channels,
        features=len(outputs),
        groups=layer.groups,
        slots=_tuple(slots),
        outputs=_numbers(outputs),
        idle=idle,
    )
    if len(copies):
        result.places[fields["shift"]] = RowsPlace(channels, _tuple(copies), axis=-2)


def _numbers(mask: NDArray[np.bool_]) -> tuple[int, ...]:
    return _tuple(np.flatnonzero(mask))


def _tuple(numbers: NDArray[Any]) -> tuple[int, ...]:
    return tuple(int(number) for number in numbers)


def _parts(path: str) -> tuple[str, ...]:
    return tuple(path.split("/")) if path else ()
