"""Where the arrays of a compacted layer lie in those of the whole one."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from selconv_jax.compaction._gather import Index, spread_channels, take_channels

__all__ = ["KernelPlace", "RowsPlace"]


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
        idle: Positions in ``slots``.
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
