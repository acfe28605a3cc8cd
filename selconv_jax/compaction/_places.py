"""Gathers of channels whose indices are static, and the places of small variables in whole ones."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import NDArray

from selconv_jax._xla.explicit_axes import replicated, sharded_as
from selconv_jax._xla.materialize import materialize

Index = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class RowsPlace:
    """Place of a smaller array in a whole one: distinct entries along one axis, which is negative."""

    size: int
    index: Index
    axis: int = -1

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Check whether an array of this shape has such an axis."""
        return len(shape) >= -self.axis and shape[self.axis] == self.size

    def take(self, array: jax.Array) -> jax.Array:
        """Take the smaller array from the whole one."""
        return take_channels(replicated(array), self.index, self.axis)

    def put(self, array: jax.Array, small: jax.Array) -> jax.Array:
        """Write the smaller array into the whole one."""
        small = replicated(small).astype(array.dtype)
        wide = spread_channels(small, self.index, self.size, self.axis)
        is_taken = index_mask(self.index, self.size, self.axis, array.ndim)
        return sharded_as(jnp.where(is_taken, wide, replicated(array)), array)


@dataclasses.dataclass(frozen=True)
class KernelPlace:
    """Place of a smaller kernel in a whole one ``[*K, C / G, O]``: some of its rows and outputs.

    Rows of idle channels are zeros in the smaller kernel, and are not written back to the whole one.
    """

    channels: int  # C
    features: int  # O
    groups: int  # G
    slots: Index  # indices of the kept input channels, group by group
    outputs: Index  # indices of the kept outputs, ascending
    idle: Index = ()  # indices into ``slots``

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Check whether an array of this shape is such a kernel."""
        return tuple(shape[-2:]) == (self.channels // self.groups, self.features)

    def take(self, kernel: jax.Array) -> jax.Array:
        """Take the smaller kernel from the whole one."""
        kernel = replicated(kernel)
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
        small = replicated(small).astype(kernel.dtype)
        if (rows == rows[:, :1]).all():
            wide = spread_channels(small, self.outputs, self.features, -1)
            wide = spread_channels(wide, tuple(rows[:, 0].tolist()), self.channels // self.groups, -2)
        else:
            flat = small.reshape(*small.shape[:-2], -1)
            size = math.prod(kernel.shape[-2:])
            wide = spread_channels(flat, self._entries(rows), size).reshape(kernel.shape)
        mask = np.zeros(kernel.shape[-2:], bool)
        mask[rows, np.array(self.outputs)[None, :]] = active
        return sharded_as(jnp.where(_to_rank(mask, kernel.ndim), wide, replicated(kernel)), kernel)

    def _rows_and_active(self) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return the row here of each entry of the smaller kernel ``[R, O']``, and whether it is not idle."""
        per_group = self.channels // self.groups
        groups = np.array(self.outputs) // (self.features // self.groups)
        _, groups = np.unique(groups, return_inverse=True)  # index among the kept groups
        count = len(self.slots) // (int(groups.max()) + 1)
        active = ~index_mask(self.idle, len(self.slots))
        rows = np.array(self.slots).reshape(-1, count) % per_group
        return rows[groups].T, active.reshape(-1, count)[groups].T

    def _entries(self, rows: NDArray[np.int64]) -> Index:
        return tuple((rows * self.features + np.array(self.outputs)[None, :]).reshape(-1).tolist())


def _to_rank(mask: NDArray[np.bool_], rank: int) -> NDArray[np.bool_]:
    """Prepend axes of length 1 to a mask over the last axes."""
    return mask.reshape(*(1,) * (rank - mask.ndim), *mask.shape)


Place = KernelPlace | RowsPlace


def take_channels(x: jax.Array, index: Index, axis: int = -1) -> jax.Array:
    """Take some of the channels, none twice: ``[..., C, ...]`` to ``[..., len(index), ...]``.

    All channels in order are the array itself, and consecutive ones are a slice. In all other cases the
    gradient is the inverse gather, with zeros for the channels that were not read: the default transpose of
    a gather is a scatter, which is slow.
    """
    axis %= x.ndim
    start = index[0] if index else 0
    if index == tuple(range(start, start + len(index))):
        return x if len(index) == x.shape[axis] else lax.slice_in_dim(x, start, start + len(index), axis=axis)
    return _gather(x, index, x.shape[axis], axis)


def spread_channels(x: jax.Array, index: Index, size: int, axis: int = -1) -> jax.Array:
    """Write channels to their places among ``size`` zeros; the transpose of `take_channels`.

    Example:
        >>> spread_channels(jnp.array([1, 2]), (2, 0), 4).tolist()
        [2, 0, 1, 0]
    """
    axis %= x.ndim
    if index == tuple(range(size)):
        return x
    if not index:
        return jnp.zeros((*x.shape[:axis], size, *x.shape[axis + 1 :]), x.dtype)
    taken = _taken(x, _inverse(index, size), axis)
    # The CPU compiler would gather again for each operation that reads the result.
    return materialize(jnp.where(index_mask(index, size, axis, x.ndim), taken, jnp.zeros((), x.dtype)))


def take_repeated(x: jax.Array, index: Index) -> jax.Array:
    """Take channels of the last axis, possibly with repetitions.

    The gradient sums over repetitions by one product with a constant matrix.

    Example:
        >>> jax.grad(lambda x: take_repeated(x, (1, 1, 0)).sum())(jnp.ones(3)).tolist()
        [1.0, 2.0, 0.0]
    """
    if len(set(index)) == len(index):
        return take_channels(x, index)
    return _gather_repeated(x, index, x.shape[-1])


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _gather(x: jax.Array, index: Index, size: int, axis: int) -> jax.Array:
    del size
    return materialize(_taken(x, np.array(index, np.int32), axis))


@_gather.defjvp
def _gather_jvp(
    index: Index, size: int, axis: int, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    # Written as a scatter so that its transpose, the gradient, is the gather of `spread_channels`.
    mask = index_mask(index, size, axis, tangents[0].ndim)
    read = jnp.where(mask, materialize(tangents[0]), jnp.zeros((), tangents[0].dtype))
    return _gather(*primals, index, size, axis), _put(read, _inverse(index, size), len(index), axis)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _gather_repeated(x: jax.Array, index: Index, size: int) -> jax.Array:
    del size
    return materialize(_taken(x, np.array(index, np.int32), x.ndim - 1))


@_gather_repeated.defjvp
def _gather_repeated_jvp(
    index: Index, size: int, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    read = jax.nn.one_hot(np.array(index, np.int32), size, dtype=tangents[0].dtype)  # [copies, C]
    tangent = jnp.dot(tangents[0], read.T, precision=lax.Precision.HIGHEST)
    return _gather_repeated(*primals, index, size), tangent


def _inverse(index: Index, size: int) -> NDArray[np.int32]:
    """Return the position in ``index`` of each of ``size`` channels; 0 for those that it does not hold."""
    inverse = np.zeros(size, np.int32)
    inverse[list(index)] = np.arange(len(index))
    return inverse


def index_mask(index: Index, size: int, axis: int = 0, rank: int = 1) -> NDArray[np.bool_]:
    """Return a mask of the indices along one of ``rank`` axes, the others of length 1."""
    mask = np.zeros(size, bool)
    mask[list(index)] = True
    return mask.reshape([size if other == axis % rank else 1 for other in range(rank)])


def _taken(x: jax.Array, index: NDArray[np.int32], axis: int) -> jax.Array:
    """Gather entries along an axis; along the last one as columns of a matrix, which is faster on CPU."""
    if axis < x.ndim - 1 or x.ndim < 3:
        return jnp.take(x, index, axis=axis, mode="clip")
    return jnp.take(_rows(x), index, axis=1, mode="clip").reshape(*x.shape[:-1], len(index))


def _put(x: jax.Array, index: NDArray[np.int32], size: int, axis: int) -> jax.Array:
    """Add entries to zeros along an axis; the transpose of `_taken`."""
    shape = (*x.shape[:axis], size, *x.shape[axis + 1 :])
    if axis == x.ndim - 1 and x.ndim >= 3:
        x, axis = _rows(x), 1
    zeros = jnp.zeros((*x.shape[:axis], size, *x.shape[axis + 1 :]), x.dtype)
    return zeros.at[(*(slice(None),) * axis, index)].add(x, mode="clip").reshape(shape)


def _rows(x: jax.Array) -> jax.Array:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
