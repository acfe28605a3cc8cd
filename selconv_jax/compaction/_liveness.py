"""Which channels of a network are needed, and what each layer reads and makes without the others."""

import dataclasses
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from selconv_jax.compaction._flow import Flow, Ids

__all__ = ["Allocated", "Kept", "needed_channels"]

Mask = NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class Allocated:
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


def needed_channels(flow: Flow, layers: Mapping[str, Allocated], multiple: int) -> Kept:
    """Finds the channels that some live layer reads, and rounds the widths.

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

    def __init__(self, flow: Flow, layers: Mapping[str, Allocated], multiple: int) -> None:
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
        """Keeps as many outputs in every group that has some, and a whole multiple of them."""
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
