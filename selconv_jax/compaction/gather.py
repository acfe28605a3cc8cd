"""Reading some of an array's channels, which ones being known when the program is compiled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import NDArray

from selconv_jax.stored import stored

__all__ = ["spread_channels", "take_channels", "take_repeated"]

Index = tuple[int, ...]


def take_channels(x: jax.Array, index: Index, axis: int = -1) -> jax.Array:
    """Some of the channels, none twice.

    All of them in their order are the array itself, neighbours in their order are a slice. The gradient of
    anything else is again a gather, the inverse one with zeros for what was not read: compilers make
    scatters of their own transpose of a gather, which are slow.

    Args:
        x: ``[..., C, ...]``, any type.
        index: Positions in ``0 .. C - 1``, all different.
        axis: The axis of the channels.

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
    """The transpose of `take_channels`: channels put into their places, zeros elsewhere.

    Args:
        x: ``[..., len(index), ...]``, any type.
        index: Places in ``0 .. size - 1``, all different.
        size: Number of channels of the result.
        axis: The axis of the channels.

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
    inverse = np.zeros(size, np.int32)
    filled = np.zeros(size, bool)
    inverse[list(index)] = np.arange(len(index))
    filled[list(index)] = True
    taken = _taken(x, inverse, axis)
    mask = np.expand_dims(filled, tuple(other for other in range(x.ndim) if other != axis))
    # The CPU compiler would gather anew for each reader.
    return stored(jnp.where(mask, taken, jnp.zeros((), x.dtype)))


def take_repeated(x: jax.Array, index: Index) -> jax.Array:
    """Channels of the last axis, some perhaps several times.

    The gradient sums over the repetitions in one product with a constant matrix.

    Args:
        x: ``[..., C]`` floating.
        index: Positions in ``0 .. C - 1``.

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


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(x: jax.Array, index: Index, size: int, axis: int) -> jax.Array:
    del size
    return stored(_taken(x, np.array(index, np.int32), axis))


def _gather_forward(x: jax.Array, index: Index, size: int, axis: int) -> tuple[jax.Array, None]:
    return _gather(x, index, size, axis), None


def _gather_backward(
    index: Index, size: int, axis: int, saved: None, cotangent: jax.Array
) -> tuple[jax.Array]:
    del saved
    return (spread_channels(cotangent, index, size, axis),)


_gather.defvjp(_gather_forward, _gather_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather_repeated(x: jax.Array, index: Index, size: int) -> jax.Array:
    del size
    return stored(_taken(x, np.array(index, np.int32), x.ndim - 1))


def _gather_repeated_forward(x: jax.Array, index: Index, size: int) -> tuple[jax.Array, None]:
    return _gather_repeated(x, index, size), None


def _gather_repeated_backward(index: Index, size: int, saved: None, cotangent: jax.Array) -> tuple[jax.Array]:
    del saved
    read = jax.nn.one_hot(np.array(index, np.int32), size, dtype=cotangent.dtype)  # [copies, C]
    return (jnp.dot(cotangent, read, precision=lax.Precision.HIGHEST),)


_gather_repeated.defvjp(_gather_repeated_forward, _gather_repeated_backward)


def _taken(x: jax.Array, index: NDArray[np.int32], axis: int) -> jax.Array:
    """Entries along an axis; as rows of a matrix if it is the last, which is the faster gather on CPU."""
    if axis < x.ndim - 1 or x.ndim < 3:
        return jnp.take(x, index, axis=axis, mode="clip")
    rows = x.reshape(-1, x.shape[-1])
    return jnp.take(rows, index, axis=1, mode="clip").reshape(*x.shape[:-1], len(index))
