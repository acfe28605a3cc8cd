"""Liveness of a network's channels, and the layouts and places of layers without the dead ones."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util
from flax.core import unfreeze
from numpy.typing import NDArray

from selconv_jax.compaction._flow import Flow, Ids
from selconv_jax.compaction._network import path_parts
from selconv_jax.compaction._places import KernelPlace, Place, RowsPlace
from selconv_jax.compaction._static_conv import LayerLayout
from selconv_jax.compaction._trace import LAYER_VARIABLES, Field, Trace

Mask = NDArray[np.bool_]


class HostAllocation(NamedTuple):
    """The allocation of a layer, on the host."""

    gate: Mask  # [C]; all true in a plain layer
    source: NDArray[np.int64]  # [C], -1 where the channel reads itself
    groups: int
    is_plain: bool


def host_allocations(
    traces: Sequence[Trace], flow: Flow, variables: Mapping[str, Any]
) -> dict[str, HostAllocation]:
    """Collect the allocations of all layers that may be changed, by path."""
    gates = traverse_util.flatten_dict(unfreeze(variables.get("selectivity", {})))
    if any(isinstance(leaf, jax.core.Tracer) for leaf in gates.values()):
        raise ValueError(
            "gates and sources are traced, but they decide what is compiled. Plan outside of jax.jit and use "
            "the plan's take and put inside."
        )
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in gates.values()):
        raise ValueError("gates and sources are shapes; pass their values, which decide what is compiled.")
    gates = jax.device_get(gates)
    groups = {path: count for trace in traces for path, count in trace.groups.items()}
    layers = {}
    for path, ids in flow.inputs.items():
        if path in flow.fixed:
            continue
        of_gate, of_source = ((*path_parts(path), name) for name in ("gate", "source"))
        gate = np.asarray(gates.get(of_gate, np.ones(len(ids), bool)), bool)
        source = np.asarray(gates.get(of_source, np.full(len(ids), -1)), np.int64)
        if gate.shape != ids.shape:
            raise ValueError(
                f"layer {path!r}: gate has shape {gate.shape}, but the input has {len(ids)} channels. Pass "
                "the variables of this model."
            )
        layers[path] = HostAllocation(gate, source, groups[path], is_plain=of_gate not in gates)
    return layers


class Kept(NamedTuple):
    """Channels that a smaller network keeps."""

    inputs: dict[str, Mask]  # [C], by the path of a layer: of its input array
    slots: dict[str, Mask]  # [C], by the path of a layer: after its selection (kernel rows)
    outputs: dict[str, Mask]  # [O], by the path of a layer or other convolution
    live: Mask  # [ids], of the flow


def needed_channels(flow: Flow, layers: Mapping[str, HostAllocation], multiple: int) -> Kept:
    """Find the channels that the output depends on, and round the widths.

    A channel is needed if an operation other than a layer reads it, or if a layer with a needed output reads
    it through an open gate, directly or as the source of a copy. All groups of a convolution keep the same
    number of channels; a group without a needed output is removed. If equal groups or rounding take more
    channels than are needed, closed ones are kept: first those whose input is live anyway, then by index.
    ``layers`` has the allocation of every layer in ``flow.inputs``.
    """
    return _Search(flow, layers, multiple).run()


class _Search:
    """Fixed-point iteration over the set of live classes, indexed by their representatives.

    The set only grows, so it converges. It starts with the channels that other operations need.
    """

    def __init__(self, flow: Flow, layers: Mapping[str, HostAllocation], multiple: int) -> None:
        self._flow = flow
        self._layers = layers
        self._multiple = multiple
        self._live = np.zeros(len(flow.classes), bool)
        self._live[flow.classes[flow.needed]] = True

    def run(self) -> Kept:
        count = -1
        while count != (count := int(self._live.sum())):
            # Needs propagate backwards, so in reverse program order one sweep usually reaches all layers.
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
        # Rounding is left out: it must not make more channels live, only keep some that already are.
        layer, ids, slots = self._layers[path], self._flow.inputs[path], self._slots(path, rounded=False)
        copies = slots & layer.gate & (layer.source >= 0)
        self._mark(ids[slots & ~copies])
        self._mark(ids[layer.source[copies]])

    def _slots(self, path: str, rounded: bool) -> Mask:
        """Choose the layer's kept slots ``[C]``, the same number in every live group."""
        layer = self._layers[path]
        live_groups = self._is_live(self._flow.outputs[path]).reshape(layer.groups, -1).any(axis=1)
        chosen = layer.gate.reshape(layer.groups, -1) & live_groups[:, None]
        if not live_groups.any():
            return chosen.reshape(-1)
        arriving = self._is_live(self._flow.inputs[path]).reshape(layer.groups, -1)
        count = max(1, int(chosen.sum(axis=1).max()))  # a convolution needs at least one input
        if rounded:
            available = int((chosen | arriving).sum(axis=1)[live_groups].min())
            count = max(count, min(self._round_up(count, int(live_groups.sum())), available))
        # Fill each group up to the common count with closed slots, which become idle rows of zeros.
        for group in np.flatnonzero(live_groups):
            spare = np.flatnonzero(~chosen[group])
            spare = spare[np.argsort(~arriving[group, spare], kind="stable")]
            chosen[group, spare[: count - int(chosen[group].sum())]] = True
        return chosen.reshape(-1)

    def _level_outputs(self, path: str) -> None:
        """Keep the same number of outputs in every live group, rounded up to the multiple in total."""
        ids = self._flow.outputs[path]
        if path not in self._layers:  # a convolution of Flax cannot have zero outputs
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
        """Return the smallest number of channels per group, at least ``count``, with a multiple in total."""
        while count * groups % self._multiple:
            count += 1
        return count


Places = dict[Field, Place | None]


def reduction(
    layers: Mapping[str, HostAllocation], kept: Kept
) -> tuple[dict[str, LayerLayout], dict[str, int], Places]:
    """Lay out every layer that changes, and if any does, all that are not plain.

    Returns:
        Layouts and widths, see `Compact`, and places, see `CompactionPlan`.
    """
    layouts: dict[str, LayerLayout] = {}
    places: Places = {}
    changed = {path for path, layer in layers.items() if not _is_whole(layer, kept, path)}
    narrower = {path for path in kept.outputs if path not in layers and not kept.outputs[path].all()}
    for path, layer in layers.items():
        if path in changed or ((changed or narrower) and not layer.is_plain):
            layouts[path], own = _layout(path, layer, kept)
            places |= own
    for path in narrower:
        outputs = kept.outputs[path]
        place = RowsPlace(len(outputs), _numbers(outputs))
        places |= {("params", *path_parts(path), name): place for name in ("kernel", "bias")}
    return layouts, {path: int(kept.outputs[path].sum()) for path in narrower}, places


def _is_whole(layer: HostAllocation, kept: Kept, path: str) -> bool:
    masks = (layer.gate, layer.source < 0, kept.inputs[path], kept.slots[path], kept.outputs[path])
    return all(mask.all() for mask in masks)


def _layout(path: str, layer: HostAllocation, kept: Kept) -> tuple[LayerLayout, Places]:
    """Return the layout of a layer, and the places of all variables that it may have."""
    fields = {name: (collection, *path_parts(path), name) for collection, name in LAYER_VARIABLES}
    places: Places = dict.fromkeys(fields.values())
    inputs, outputs = kept.inputs[path], kept.outputs[path]
    arriving = int(inputs.sum())
    if not outputs.any():
        return LayerLayout(inputs=arriving, own=(), copied=(), outputs=0), places
    channels = len(layer.gate)
    position = np.cumsum(inputs) - 1
    live_groups = outputs.reshape(layer.groups, -1).any(axis=1)
    is_copy = kept.slots[path] & layer.gate & (layer.source >= 0)
    own = np.flatnonzero(kept.slots[path] & ~is_copy)
    copies = np.flatnonzero(is_copy)
    read = np.concatenate([own, copies])
    if len(read) == arriving and layer.groups == 1:
        # Channels read directly stay where they arrive, and the copies take the free positions between
        # them, see `LayerLayout.is_in_place`: `order` sorts the reads by their position in the input.
        free = np.setdiff1d(np.arange(arriving), position[own])
        order = np.argsort(np.concatenate([position[own], free]))
    else:
        # In each group the channels read directly, then the copies; without groups the order of `read`.
        group = np.arange(channels) // (channels // layer.groups)
        order = np.argsort(group[read], kind="stable")
    slots = read[order]
    idle = _numbers(~layer.gate[slots])
    layout = LayerLayout(
        inputs=arriving,
        own=_tuple(position[own]),
        copied=_tuple(position[layer.source[copies]]),
        outputs=int(outputs.sum()),
        groups=int(live_groups.sum()),
        idle=idle,
        order=() if (slots == read).all() else _tuple(order),
    )
    per_channel = RowsPlace(channels, _tuple(slots))
    places |= {fields[name]: per_channel for name in ("scale", "bias", "mean", "var")}
    places[fields["kernel"]] = KernelPlace(
        channels=channels,
        features=len(outputs),
        groups=layer.groups,
        slots=_tuple(slots),
        outputs=_numbers(outputs),
        idle=idle,
    )
    if len(copies):
        places[fields["shift"]] = RowsPlace(channels, _tuple(copies), axis=-2)
    return layout, places


def _numbers(mask: Mask) -> tuple[int, ...]:
    return _tuple(np.flatnonzero(mask))


def _tuple(numbers: NDArray[Any]) -> tuple[int, ...]:
    return tuple(numbers.tolist())
