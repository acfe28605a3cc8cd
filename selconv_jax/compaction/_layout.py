"""Layouts of compacted layers, and the places of their variables in those of the whole network."""

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
    """Fixed allocation of a layer, static in the compiled program.

    The layer computes with `reads` channels: those that it reads directly, then the copies, or in another
    order if ``order`` is given, as groups need it. All indices count from 0.

    Attributes:
        inputs: Number of input channels.
        own: Indices of the input channels that are read directly, without duplicates.
        copied: Index of the input channel that each copy reads through its shift.
        outputs: Number of output channels; 0: the output is unused and not computed.
        groups: Number of groups of the convolution.
        idle: Indices of the reads whose kernel rows are zero and stay zero.
        order: Permutation of ``[own, copied]`` that gives the reads; empty: the identity.

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
            problem = f"a channel is read that is not among the {self.inputs} inputs"
        elif len(set(self.own)) < len(self.own):
            problem = "a channel is read directly twice"
        elif self.order and sorted(self.order) != list(range(self.reads)):
            problem = f"order is not a permutation of {self.reads} channels"
        elif any(not 0 <= position < self.reads for position in self.idle):
            problem = f"an idle channel is not among the {self.reads} that are read"
        elif self.groups < 1 or self.outputs % self.groups or self.reads % self.groups:
            problem = f"{self.reads} reads and {self.outputs} outputs do not divide into {self.groups} groups"
        elif self.outputs > 0 and not self.reads:
            problem = "nothing is read"
        if problem:
            raise ValueError(f"the layout of a compacted layer is inconsistent: {problem}.")

    @property
    def reads(self) -> int:
        """Number of channels that the layer normalizes and convolves."""
        return len(self.own) + len(self.copied)

    @property
    def is_in_place(self) -> bool:
        """True if the reads are the input channels in order, some of them replaced by copies.

        They can then be computed as before compaction, without a gather of the channels read directly.
        """
        if not self.copied or self.reads != self.inputs:
            return False
        order = self.order or range(self.reads)
        return all(order[channel] == number for number, channel in enumerate(self.own))

    def to_json(self) -> dict[str, Any]:
        """Convert to plain numbers and lists, with runs of consecutive indices as ``[first, count]``."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            name: _runs(value) if isinstance(value, tuple) else value
            for name, value in fields.items()
            if value != ()
        }

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "LayerLayout":
        """Restore a layout from the plain values of `to_json`.

        Raises:
            ValueError: They are not those of a layout.
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
    """Place of a smaller array in a whole one: some of the entries along one axis.

    Attributes:
        size: Length of the axis.
        index: Indices of the entries, without duplicates.
        axis: The axis, negative.
    """

    size: int
    index: Index
    axis: int = -1

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Check whether an array of this shape has such an axis."""
        return len(shape) >= -self.axis and shape[self.axis] == self.size

    def take(self, array: jax.Array) -> jax.Array:
        """Take the smaller array from the whole one."""
        return take_channels(array, self.index, self.axis)

    def put(self, array: jax.Array, small: jax.Array) -> jax.Array:
        """Write the smaller array into the whole one."""
        filled = np.zeros(self.size, bool)
        filled[list(self.index)] = True
        mask = filled.reshape(-1, *(1,) * (-1 - self.axis))
        wide = spread_channels(small.astype(array.dtype), self.index, self.size, self.axis)
        return jnp.where(_to_rank(mask, array.ndim), wide, array)


@dataclasses.dataclass(frozen=True)
class KernelPlace:
    """Place of a smaller kernel in a whole one ``[*K, C / G, O]``: some of its rows and outputs.

    Rows of idle channels are zeros in the smaller kernel, and are not written back to the whole one.

    Attributes:
        channels: Number of input channels ``C``.
        features: Number of outputs ``O``.
        groups: Number of groups ``G``.
        slots: Indices of the kept input channels, group by group.
        outputs: Indices of the kept outputs, ascending.
        idle: Indices into ``slots``.
    """

    channels: int
    features: int
    groups: int
    slots: Index
    outputs: Index
    idle: Index = ()

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Check whether an array of this shape is such a kernel."""
        return tuple(shape[-2:]) == (self.channels // self.groups, self.features)

    def take(self, kernel: jax.Array) -> jax.Array:
        """Take the smaller kernel from the whole one."""
        rows, active = self._rows_and_active()
        if (rows == rows[:, :1]).all():
            small = take_channels(kernel, tuple(rows[:, 0].tolist()), -2)
            small = take_channels(small, self.outputs, -1)
        else:
            # The rows differ between groups: gather single entries of the last two axes, flattened.
            flat = kernel.reshape(*kernel.shape[:-2], -1)
            small = take_channels(flat, self._entries(rows)).reshape(*kernel.shape[:-2], *rows.shape)
        if not self.idle:
            return small
        return jnp.where(_to_rank(active, small.ndim), small, jnp.zeros((), small.dtype))

    def put(self, kernel: jax.Array, small: jax.Array) -> jax.Array:
        """Write the smaller kernel into the whole one."""
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
        """Return the row here of each entry of the smaller kernel ``[R, O']``, and whether it is not idle."""
        per_group = self.channels // self.groups
        groups = np.array(self.outputs) // (self.features // self.groups)
        _, groups = np.unique(groups, return_inverse=True)  # index among the kept groups
        count = len(self.slots) // (int(groups.max()) + 1)
        active = np.ones(len(self.slots), bool)
        active[list(self.idle)] = False
        rows = np.array(self.slots).reshape(-1, count) % per_group
        return rows[groups].T, active.reshape(-1, count)[groups].T

    def _entries(self, rows: NDArray[np.int64]) -> Index:
        return tuple((rows * self.features + np.array(self.outputs)[None, :]).reshape(-1).tolist())


def _to_rank(mask: NDArray[np.bool_], rank: int) -> NDArray[np.bool_]:
    """Prepend axes of length 1 to a mask over the last axes."""
    return mask.reshape(*(1,) * (rank - mask.ndim), *mask.shape)
