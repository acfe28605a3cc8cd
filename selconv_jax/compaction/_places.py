"""Gathers of channels whose indices are known at compile time."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import NDArray

from selconv_jax._xla.materialize import materialize

__all__ = ["spread_channels", "take_channels", "take_repeated"]

Index = tuple[int, ...]


def take_channels(x: jax.Array, index: Index, axis: int = -1) -> jax.Array:
    """Take some of the channels, none twice.

    All channels in order are the array itself, and consecutive ones are a slice. In all other cases the
    gradient is the inverse gather, with zeros for the channels that were not read: the default transpose of
    a gather is a scatter, which is slow.

    Args:
        x: ``[..., C, ...]``, any type.
        index: Distinct indices in ``0 .. C - 1``.
        axis: The channel axis.

    Returns:
        ``[..., len(index), ...]``.

    Example:
        >>> import jax.numpy as jnp
        >>> take_channels(jnp.array([[10, 11, 12]]), (2, 0)).tolist()
        [[12, 10]]
    """
    axis %= x.ndim
    start = index[0] if index else 0
    if index == tuple(range(start, start + len(index))):
        return x if len(index) == x.shape[axis] else lax.slice_in_dim(x, start, start + len(index), axis=axis)
    return _gather(x, index, x.shape[axis], axis)


def spread_channels(x: jax.Array, index: Index, size: int, axis: int = -1) -> jax.Array:
    """Write channels to their places in an array of zeros; the transpose of `take_channels`.

    Args:
        x: ``[..., len(index), ...]``, any type.
        index: Distinct indices in ``0 .. size - 1``.
        size: Number of channels of the result.
        axis: The channel axis.

    Returns:
        ``[..., size, ...]``.

    Example:
        >>> import jax.numpy as jnp
        >>> spread_channels(jnp.array([1, 2]), (2, 0), 4).tolist()
        [2, 0, 1, 0]
    """
    axis %= x.ndim
    if index == tuple(range(size)):
        return x
    if not index:
        return jnp.zeros((*x.shape[:axis], size, *x.shape[axis + 1 :]), x.dtype)
    inverse, mask = _inverse(index, size, axis, x.ndim)
    taken = _taken(x, inverse, axis)
    # The CPU compiler would gather again for each operation that reads the result.
    return materialize(jnp.where(mask, taken, jnp.zeros((), x.dtype)))


def take_repeated(x: jax.Array, index: Index) -> jax.Array:
    """Take channels of the last axis, possibly with repetitions.

    The gradient sums over repetitions by one product with a constant matrix.

    Args:
        x: ``[..., C]`` floating.
        index: Indices in ``0 .. C - 1``.

    Returns:
        ``[..., len(index)]``.

    Example:
        >>> import jax, jax.numpy as jnp
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
    inverse, mask = _inverse(index, size, axis, tangents[0].ndim)
    read = jnp.where(mask, materialize(tangents[0]), jnp.zeros((), tangents[0].dtype))
    return _gather(*primals, index, size, axis), _put(read, inverse, len(index), axis)


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


def _inverse(index: Index, size: int, axis: int, rank: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Invert ``index``: the position in it of each of ``size`` channels, and a mask of those it holds."""
    inverse = np.zeros(size, np.int32)
    filled = np.zeros(size, bool)
    inverse[list(index)] = np.arange(len(index))
    filled[list(index)] = True
    return inverse, np.expand_dims(filled, tuple(other for other in range(rank) if other != axis))


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
