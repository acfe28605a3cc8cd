"""What a layer keeps, where its parameters lie in the whole network's, and how they get there and back."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from selconv_jax.compaction._gather import Index, spread_channels, take_channels

__all__ = ["KernelPlace", "LayerLayout", "RowsPlace"]


@dataclasses.dataclass(frozen=True)
class LayerLayout:
    """The fixed allocation of a layer: a static constant of the compiled program.

    The layer's own channels, the `reads` of them, are those read directly, then the copies; in a layer with
    groups they are arranged group by group by ``order``. All positions count from 0.

    Attributes:
        inputs: Channels of the array that comes in.
        own: Incoming channel of each directly read one, no channel twice.
        copied: Incoming channel that each copy reads through its shift.
        outputs: Channels that the layer makes; 0: nobody needs it, and it is not computed.
        groups: Groups of the convolution.
        idle: Positions among the reads whose kernel rows are zero and stay zero.
        order: Permutation of ``[own, copied]`` that makes the reads; empty: they are in order.

    Example:
        >>> layout = LayerLayout(inputs=6, own=(0, 1, 4), copied=(4,), outputs=8)
        >>> layout.reads
        4
        >>> LayerLayout.from_json(layout.to_json()) == layout
        True
    """

    inputs: int
    own: tuple[int, ...]
    copied: tuple[int, ...]
    outputs: int
    groups: int = 1
    idle: tuple[int, ...] = ()
    order: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        positions = (*self.own, *self.copied)
        problem = None
        if any(not 0 <= position < self.inputs for position in positions):
            problem = f"a channel is read that the {self.inputs} inputs do not have"
        elif len(set(self.own)) < len(self.own):
            problem = "a channel is read directly twice"
        elif self.order and sorted(self.order) != list(range(self.reads)):
            problem = f"order is no permutation of {self.reads} channels"
        elif any(not 0 <= position < self.reads for position in self.idle):
            problem = f"an idle channel is none of the {self.reads} that are read"
        elif self.groups < 1 or self.outputs % self.groups or self.reads % self.groups:
            problem = f"{self.reads} reads and {self.outputs} outputs do not divide into {self.groups} groups"
        elif self.outputs > 0 and not self.reads:
            problem = "nothing is read"
        if problem:
            raise ValueError(f"the layout of a compacted layer contradicts itself: {problem}.")

    @property
    def reads(self) -> int:
        """Channels that the layer normalizes and convolves."""
        return len(self.own) + len(self.copied)

    @property
    def is_in_place(self) -> bool:
        """Whether the reads are the incoming channels, some of them replaced by copies.

        Then they can be computed without a gather of the own channels, as before compaction.
        """
        if not self.copied or self.reads != self.inputs:
            return False
        order = self.order or range(self.reads)
        return all(order[channel] == number for number, channel in enumerate(self.own))

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and lists; rising neighbours as ``[first, count]``."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            name: _runs(value) if isinstance(value, tuple) else value
            for name, value in fields.items()
            if value != ()
        }

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "LayerLayout":
        """The layout that `to_json` turned into plain values.

        Raises:
            ValueError: It is none.
        """
        try:
            fields = {
                name: _numbers(value) if isinstance(value, list) else int(value)
                for name, value in values.items()
            }
            return LayerLayout(**{"own": (), "copied": (), **fields})  # type: ignore[arg-type]
        except TypeError as error:
            raise ValueError(f"not the layout of a layer ({error}).") from error


def _runs(numbers: Iterable[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == sum(runs[-1]):
            runs[-1][1] += 1
        else:
            runs.append([number, 1])
    return runs


def _numbers(runs: Iterable[Iterable[int]]) -> tuple[int, ...]:
    return tuple(number for first, count in runs for number in range(int(first), int(first) + int(count)))


@dataclasses.dataclass(frozen=True)
class RowsPlace:
    """Some entries of an array along one axis.

    Attributes:
        size: Length of the axis.
        index: The entries, none twice.
        axis: The axis, counted from the end.
    """

    size: int
    index: Index
    axis: int = -1

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of this shape has such an axis."""
        return len(shape) >= -self.axis and shape[self.axis] == self.size

    def take(self, array: jax.Array) -> jax.Array:
        """The smaller array."""
        return take_channels(array, self.index, self.axis)

    def put(self, array: jax.Array, small: jax.Array) -> jax.Array:
        """The array with the smaller one put into its place."""
        filled = np.zeros(self.size, bool)
        filled[list(self.index)] = True
        mask = filled.reshape(-1, *(1,) * (-1 - self.axis))
        wide = spread_channels(small.astype(array.dtype), self.index, self.size, self.axis)
        return jnp.where(_to_rank(mask, array.ndim), wide, array)


@dataclasses.dataclass(frozen=True)
class KernelPlace:
    """Some rows and outputs of a kernel ``[*K, C / G, O]``.

    The rows of idle channels are zeros in the smaller kernel, whatever they are in the whole one, and are
    not put back.

    Attributes:
        channels: Input channels ``C``.
        features: Outputs ``O``.
        groups: Groups ``G``.
        slots: Input channels that are left, group by group.
        outputs: Outputs that are left, rising.
        idle: Positions in ``capacity``.
    """

    channels: int
    features: int
    groups: int
    slots: Index
    outputs: Index
    idle: Index = ()

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of this shape is such a kernel."""
        return tuple(shape[-2:]) == (self.channels // self.groups, self.features)

    def take(self, kernel: jax.Array) -> jax.Array:
        """The smaller kernel."""
        rows, active = self._rows_and_active()
        if (rows == rows[:, :1]).all():
            small = take_channels(kernel, tuple(rows[:, 0].tolist()), -2)
            small = take_channels(small, self.outputs, -1)
        else:
            # Each group has rows of its own: single entries of the last two axes laid end to end.
            flat = kernel.reshape(*kernel.shape[:-2], -1)
            small = take_channels(flat, self._entries(rows)).reshape(*kernel.shape[:-2], *rows.shape)
        if not self.idle:
            return small
        return jnp.where(_to_rank(active, small.ndim), small, jnp.zeros((), small.dtype))

    def put(self, kernel: jax.Array, small: jax.Array) -> jax.Array:
        """The kernel with the smaller one put into its place."""
        rows, active = self._rows_and_active()
        small = small.astype(kernel.dtype)
        if (rows == rows[:, :1]).all():
            wide = spread_channels(small, self.outputs, self.features, -1)
            wide = spread_channels(wide, tuple(rows[:, 0].tolist()), self.channels // self.groups, -2)
        else:
            flat = small.reshape(*small.shape[:-2], -1)
            size = math.prod(kernel.shape[-2:])
            wide = spread_channels(flat, self._entries(rows), size).reshape(kernel.shape)
        mask = np.zeros(kernel.shape[-2:], bool)
        mask[rows, np.array(self.outputs)[None, :]] = active
        return jnp.where(_to_rank(mask, kernel.ndim), wide, kernel)

    def _rows_and_active(self) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """For each row and output of the smaller kernel ``[R, O']``: the row it has here; not idle."""
        per_group = self.channels // self.groups
        groups = np.array(self.outputs) // (self.features // self.groups)
        _, groups = np.unique(groups, return_inverse=True)  # those that are left, counted from 0
        count = len(self.slots) // (int(groups.max()) + 1)
        active = np.ones(len(self.slots), bool)
        active[list(self.idle)] = False
        rows = np.array(self.slots).reshape(-1, count) % per_group
        return rows[groups].T, active.reshape(-1, count)[groups].T

    def _entries(self, rows: NDArray[np.int64]) -> Index:
        return tuple((rows * self.features + np.array(self.outputs)[None, :]).reshape(-1).tolist())


def _to_rank(mask: NDArray[np.bool_], rank: int) -> NDArray[np.bool_]:
    """A mask over the last axes, with axes of length 1 before them."""
    return mask.reshape(*(1,) * (rank - mask.ndim), *mask.shape)
