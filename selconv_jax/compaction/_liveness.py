"""Which channels of a network are needed, and each layer's layout and placement without the others."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selconv_jax.compaction._flow import Flow, Ids
from selconv_jax.compaction._layout import KernelPlace, LayerLayout, RowsPlace
from selconv_jax.compaction._trace import LAYER_VARIABLES, Field

__all__ = ["HostAllocation", "Kept", "Place", "Reduction", "needed_channels", "reduction"]

Mask = NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class HostAllocation:
    """The allocation of a layer, on the host.

    Attributes:
        gate: ``[C]`` bool; all open in a plain layer.
        source: ``[C]`` int, -1 where the channel reads itself.
        groups: Groups of the convolution.
    """

    gate: Mask
    source: NDArray[np.int64]
    groups: int

    @property
    def is_untouched(self) -> bool:
        """Whether nothing is closed and nothing copied."""
        return bool(self.gate.all() and (self.source < 0).all())


@dataclasses.dataclass(frozen=True)
class Kept:
    """What is left of a network.

    Attributes:
        inputs: ``[C]`` bool, by the path of a layer: incoming channels that are left.
        slots: ``[C]`` bool, by the path of a layer: its own channels that are left.
        outputs: ``[O]`` bool, by the path of a layer or other convolution: channels it still makes.
        live: ``[ids]`` bool, every channel of the flow that is left.
    """

    inputs: dict[str, Mask]
    slots: dict[str, Mask]
    outputs: dict[str, Mask]
    live: Mask


def needed_channels(flow: Flow, layers: Mapping[str, HostAllocation], multiple: int) -> Kept:
    """Find the channels that some live layer reads, and round the widths.

    A channel is needed if something other than a layer reads it, or a layer with a needed output does,
    through an open gate: directly, or as the source of a copy. All groups of a convolution keep equally
    many channels; a group without a needed output is removed as a whole. Where that, or the rounding, asks
    for more than is needed, closed channels are kept: first those that come in anyway, then by index.

    Args:
        flow: From `flow.channel_flow`.
        layers: Allocation of every layer in ``flow.inputs``.
        multiple: Widths are rounded up to a multiple of it, as far as there are channels.

    Returns:
        What is left.
    """
    return _Search(flow, layers, multiple).run()


class _Search:
    """A set of needed classes that grows until nothing more is needed."""

    def __init__(self, flow: Flow, layers: Mapping[str, HostAllocation], multiple: int) -> None:
        self._flow = flow
        self._layers = layers
        self._multiple = multiple
        self._live = np.zeros(len(flow.classes), bool)
        self._live[flow.classes[flow.needed]] = True

    def run(self) -> Kept:
        count = -1
        while count != (count := int(self._live.sum())):
            for path in reversed(self._flow.inputs):
                self._read(path)
            for path in self._flow.outputs:
                self._level_outputs(path)
        return Kept(
            inputs={path: self._is_live(ids) for path, ids in self._flow.inputs.items()},
            slots={path: self._slots(path, rounded=True) for path in self._flow.inputs},
            outputs={path: self._is_live(ids) for path, ids in self._flow.outputs.items()},
            live=self._live[self._flow.classes],
        )

    def _is_live(self, ids: Ids) -> Mask:
        return self._live[self._flow.classes[ids]]

    def _mark(self, ids: Ids) -> None:
        self._live[self._flow.classes[ids]] = True

    def _read(self, path: str) -> None:
        layer, ids, slots = self._layers[path], self._flow.inputs[path], self._slots(path, rounded=False)
        copies = slots & layer.gate & (layer.source >= 0)
        self._mark(ids[slots & ~copies])
        self._mark(ids[layer.source[copies]])

    def _slots(self, path: str, rounded: bool) -> Mask:
        """The layer's own channels ``[C]`` that are left, equally many in every group that is."""
        layer = self._layers[path]
        live_groups = self._is_live(self._flow.outputs[path]).reshape(layer.groups, -1).any(axis=1)
        chosen = layer.gate.reshape(layer.groups, -1) & live_groups[:, None]
        if not live_groups.any():
            return chosen.reshape(-1)
        arriving = self._is_live(self._flow.inputs[path]).reshape(layer.groups, -1)
        count = max(1, int(chosen.sum(axis=1).max()))
        if rounded:
            available = int((chosen | arriving).sum(axis=1)[live_groups].min())
            count = max(count, min(self._round_up(count, int(live_groups.sum())), available))
        for group in np.flatnonzero(live_groups):
            spare = np.flatnonzero(~chosen[group])
            spare = spare[np.argsort(~arriving[group, spare], kind="stable")]
            chosen[group, spare[: count - int(chosen[group].sum())]] = True
        return chosen.reshape(-1)

    def _level_outputs(self, path: str) -> None:
        """Keep as many outputs in every group that has some, and a whole multiple of them."""
        ids = self._flow.outputs[path]
        if path not in self._layers:  # another convolution always makes something
            groups = 1
            if not self._is_live(ids).any():
                self._mark(ids[:1])
        else:
            groups = self._layers[path].groups
        by_group = ids.reshape(groups, -1)
        live = self._is_live(by_group)
        count = int(live.sum(axis=1).max(initial=0))
        if not count:
            return
        count = self._round_up(count, int(live.any(axis=1).sum()))
        for numbers, is_live in zip(by_group, live, strict=True):
            if is_live.any():
                self._mark(numbers[~is_live][: max(0, count - int(is_live.sum()))])

    def _round_up(self, count: int, groups: int) -> int:
        """The least number of channels per group, at least ``count``, that makes a multiple in total."""
        while count * groups % self._multiple:
            count += 1
        return count


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


def reduction(
    flow: Flow, layers: dict[str, HostAllocation], kept: Kept, selective: frozenset[str]
) -> Reduction:
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


def _is_whole(layer: HostAllocation, kept: Kept, path: str) -> bool:
    masks = (kept.inputs[path], kept.slots[path], kept.outputs[path])
    return layer.is_untouched and all(mask.all() for mask in masks)


def _add_layer(result: Reduction, path: str, layer: HostAllocation, kept: Kept) -> None:
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
