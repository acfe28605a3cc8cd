"""Subpixel spatial shift of channels, and the channel selection that uses it."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from selconv_jax._utils.arguments import check_whole
from selconv_jax._xla.batch_norm import Statistics, batch_statistics, statistics_dtype
from selconv_jax._xla.materialize import materialize
from selconv_jax._xla.platforms import target_platform


def channel_shift(x: jax.Array, shift: jax.Array) -> jax.Array:
    """Shift each channel spatially by its own displacement.

    Multilinear interpolation (method, "One selective layer"): the output at pixel ``(h, w)`` is ``x``
    at ``(h + shift[c, 0], w + shift[c, 1])``, each coordinate clamped to the image. The displacement is
    constant over a channel, so the interpolation separates into one small matrix per axis and channel.
    The products are exact for shifts of any size, and their gradients are products too, not scatters.

    The gradient is 0 where a coordinate is clamped or lies exactly on the border. At a whole-pixel
    displacement, where the interpolation has a kink, it is the right-hand derivative.

    Args:
        x: ``[N, *S, C]`` floating, any number of spatial dimensions ``S``.
        shift: ``[C, len(S)]`` floating, in pixels, in the order of the spatial dimensions (row first).

    Returns:
        ``[N, *S, C]`` in the dtype of ``x``.

    Raises:
        ValueError: The shape of ``shift`` does not match ``x``.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.arange(4.0).reshape(1, 4, 1)
        >>> channel_shift(x, jnp.array([[0.5]]))[0, :, 0].tolist()
        [0.5, 1.5, 2.5, 3.0]
    """
    expected = (x.shape[-1], x.ndim - 2)
    if shift.shape != expected:
        raise ValueError(
            f"shift has shape {shift.shape}; an input of shape {x.shape} needs {expected}: "
            "one row per channel, one column per spatial dimension."
        )
    # Channels are a batch axis: each is multiplied by its own matrix. The weights are fractions, which
    # an accelerator would round to 8 bits without full precision.
    product = functools.partial(lax.dot_general, precision=lax.Precision.HIGHEST)
    spatial = list(range(1, x.ndim - 1))
    order = [x.ndim - 1, 0, *spatial]  # the dimensions of x in those of y
    y = jnp.transpose(x, order)
    matrices = _interpolation_matrices(shift, x.shape[1:-1], x.dtype)
    for axis, matrix in zip(spatial, matrices, strict=True):
        at = order.index(axis)
        if at == y.ndim - 1:
            y = product(y, matrix, (((at,), (2,)), ((0,), (0,))))
        else:
            # The product puts this dimension first. It stays there: moving it back would be a transposition.
            order.insert(1, order.pop(at))
            y = product(matrix, jnp.moveaxis(y, at, 1), (((2,), (1,)), ((0,), (0,))))
    return jnp.transpose(y, [order.index(axis) for axis in range(x.ndim)])


def _interpolation_matrices(shift: jax.Array, sizes: Sequence[int], dtype: jnp.dtype) -> list[jax.Array]:
    """Compute the interpolation weights ``[C, out, in]`` along each dimension, for shifts ``[C, len(S)]``."""
    if len(set(sizes)) == 1:
        # Dimensions of equal size are computed together, which makes a smaller program.
        return list(jax.vmap(_interpolation_matrix, in_axes=(1, None, None))(shift, sizes[0], dtype))
    return [_interpolation_matrix(shift[:, axis], size, dtype) for axis, size in enumerate(sizes)]


def _interpolation_matrix(shift: jax.Array, size: int, dtype: jnp.dtype) -> jax.Array:
    """Compute the interpolation weights ``[C, out, in]`` along one dimension, for shifts ``[C]``."""
    # A narrow type cannot even represent every pixel index of a large image.
    shift = shift.astype(statistics_dtype(shift.dtype))
    column = jnp.arange(size, dtype=shift.dtype)[None, None, :]
    position = column.swapaxes(1, 2) + shift[:, None, None]  # [C, out, 1]
    inside = (position > 0) & (position < size - 1)
    clamped = jnp.clip(lax.stop_gradient(position), 0, size - 1)
    position = jnp.where(inside, position, clamped)
    below = jnp.floor(lax.stop_gradient(position))
    fraction = position - below
    # On the last pixel the fraction is 0 and no column equals "below + 1".
    zero = jnp.zeros((), shift.dtype)
    # NaN equals no column; multiplying by 0 instead of writing 0 propagates it.
    lower = jnp.where(column == below, 1 - fraction, 0 * lax.stop_gradient(fraction))
    upper = jnp.where(column == below + 1, fraction, zero)
    return (lower + upper).astype(dtype)


def select(x: jax.Array, source: jax.Array, shift: jax.Array, capacity: int | None = None) -> jax.Array:
    """Replace copied channels by their shifted sources (method, "One selective layer", step 1).

    Channel ``j`` of the result is ``x_j`` where ``source[j] = -1``, else the channel ``source[j]`` shifted
    by ``shift[j]``. A channel may be a shifted copy of itself: ``source[j] = j`` differs from -1.

    The cost grows with ``capacity``, the number of copies that the program is compiled for, not with the
    number of channels. The result does not depend on it as long as it suffices.

    Args:
        x: ``[N, *S, C]`` floating.
        source: ``[C]`` int32 in ``-1 .. C - 1``.
        shift: ``[C, len(S)]`` floating, in pixels; ignored, with gradient 0, where ``source`` is -1.
        capacity: Upper bound of the number of copies (entries of ``source`` other than -1); None: ``C``.
            If there are more, every copy is NaN.

    Returns:
        ``[N, *S, C]`` in the dtype of ``x``.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.array([[[1.0, 10.0], [2.0, 20.0]]])
        >>> select(x, jnp.array([-1, 0]), jnp.array([[0.0], [1.0]]))[0].tolist()
        [[1.0, 2.0], [2.0, 2.0]]
    """
    capacity = _bound(capacity, x)
    if capacity == 0:
        return _replaced(x, source >= 0, jnp.nan)
    return _selected(x, source, shift, capacity)[0]


def select_with_statistics(
    x: jax.Array,
    statistics: Statistics,
    source: jax.Array,
    shift: jax.Array,
    capacity: int | None = None,
    axis_name: Any = None,
) -> tuple[jax.Array, Statistics]:
    """Select channels and derive the statistics of the result, reading only the copies.

    Args:
        x: ``[N, *S, C]`` floating.
        statistics: Statistics of ``x``, from `selconv_jax.nn.batch_statistics`.
        source: See `select`.
        shift: See `select`.
        capacity: See `select`.
        axis_name: Mapped axis over which ``statistics`` were computed.

    Returns:
        The result of `select`, and its statistics.
    """
    capacity = _bound(capacity, x)
    if capacity == 0:
        selected, *new = (_replaced(values, source >= 0, jnp.nan) for values in (x, *statistics))
        return selected, Statistics(*new)
    selected, copies, slot = _selected(x, source, shift, capacity)

    def placed(of_x: jax.Array, of_copies: jax.Array) -> jax.Array:
        return jnp.where(source >= 0, jnp.sum(jnp.where(slot, of_copies[:, None], 0), axis=0), of_x)

    return selected, Statistics(*map(placed, statistics, batch_statistics(copies, axis_name)))


def _bound(capacity: int | None, x: jax.Array) -> int:
    """Resolve ``capacity`` to the number of copies that the program provides for."""
    if capacity is None:
        return x.shape[-1]
    check_whole("capacity", capacity, 0, "a whole number of channels, at least 0, or None")
    return min(capacity, x.shape[-1])


def _replaced(x: jax.Array, channels: jax.Array, value: float) -> jax.Array:
    """Fill the channels of ``x`` ``[..., C]`` that are true in ``channels`` ``[C]`` with one value."""
    return jnp.where(lax.expand_dims(channels, range(x.ndim - 1)), jnp.asarray(value, x.dtype), x)


def _selected(
    x: jax.Array, source: jax.Array, shift: jax.Array, capacity: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Select; also return the copies ``[N, *S, capacity]`` and their channels as a mask ``[capacity, C]``."""
    channels = x.shape[-1]
    is_copy = source >= 0
    number = _numbers_of_copies(is_copy)
    slot = is_copy[None, :] & (number[None, :] == jnp.arange(capacity)[:, None])
    # Unused copies read channel 0 and are written nowhere.
    # The barrier keeps the compiler from recomputing the indices for every pixel that a gather reads.
    origin = lax.optimization_barrier(jnp.sum(jnp.where(slot, source[None, :], 0), axis=1))
    # As a product this would be a kernel of its own on accelerators.
    displacement = jnp.sum(jnp.where(slot[:, :, None], shift[None], 0), axis=1)
    if capacity < channels:
        # One copy too many makes the displacement, and so the output, of all copies NaN: an overflow cannot
        # pass for a result, and the check costs nothing per pixel.
        fits = jnp.sum(is_copy) <= capacity
        displacement = jnp.where(fits, displacement, jnp.asarray(jnp.nan, shift.dtype))
    if target_platform() != "tpu":
        copies = channel_shift(_gather(x, origin), displacement)
        return _replace(x, copies, source, slot), copies, slot
    one_hot = jax.nn.one_hot(origin, channels, dtype=x.dtype, axis=0)
    copies = channel_shift(jnp.dot(x, one_hot, precision=lax.Precision.HIGHEST), displacement)
    selected = _replaced(x, is_copy, 0) + jnp.dot(
        copies, slot.astype(x.dtype), precision=lax.Precision.HIGHEST
    )
    return selected, copies, slot


def _numbers_of_copies(is_copy: jax.Array) -> jax.Array:
    """Count the copies among the channels before each one: ``[C]`` int32."""
    channel = jnp.arange(is_copy.shape[0])
    # Comparing all pairs makes a smaller program than a cumulative sum and its inverse.
    return jnp.sum(is_copy[None, :] & (channel[None, :] < channel[:, None]), axis=1)


@jax.custom_jvp
def _gather(x: jax.Array, origin: jax.Array) -> jax.Array:
    """Gather the channels ``origin`` ``[capacity]`` of ``x``; the gradient is a product, not a scatter."""
    return _taken(x, origin)


@_gather.defjvp
def _gather_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, Any]
) -> tuple[jax.Array, jax.Array]:
    x, origin = primals
    of_x, _ = tangents
    capacity, channels = origin.shape[0], x.shape[-1]
    # Copies share sources. The gradient sums over the copies of each source by a product of slots, into the
    # first of them, and then gathers: no product with all channels, and no scatter. The tangent is the
    # transpose.
    slot = jnp.arange(capacity)
    reads = origin[:, None] == jnp.arange(channels)[None, :]  # [capacity, channels]
    first = lax.optimization_barrier(jnp.min(jnp.where(reads, slot[:, None], capacity), axis=0))
    of_sources = _replaced(of_x, first == capacity, 0)
    of_firsts = _added(jnp.zeros((*x.shape[:-1], capacity), x.dtype), of_sources, first)
    matrix = (first[origin][None, :] == slot[:, None]).astype(
        x.dtype
    )  # rows: the first copies of each source
    return _gather(x, origin), jnp.dot(of_firsts, matrix, precision=lax.Precision.HIGHEST)


@jax.custom_jvp
def _replace(x: jax.Array, copies: jax.Array, source: jax.Array, slot: jax.Array) -> jax.Array:
    """Write the copies into their slots of ``x``; both this and its gradient only gather channels."""
    place = lax.optimization_barrier(_numbers_of_copies(source >= 0))  # out of range where nothing is written
    is_copy = lax.expand_dims(source >= 0, range(x.ndim - 1))
    return jnp.where(is_copy, jnp.take(materialize(copies), place, axis=-1, mode="clip"), x)


@_replace.defjvp
def _replace_jvp(primals: tuple[jax.Array, ...], tangents: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
    _, _, source, slot = primals
    of_x, of_copies, *_ = tangents
    channel = jnp.sum(jnp.where(slot, jnp.arange(slot.shape[1])[None, :], 0), axis=1)  # [capacity]
    channel = lax.optimization_barrier(channel)
    # Unused copies have read channel 0, so their tangents must not be added to it. The tangent is a
    # scatter so that its transpose, the gradient, is a gather.
    added = _replaced(of_copies, ~jnp.any(slot, axis=1), 0)
    return _replace(*primals), _added(_replaced(of_x, source >= 0, 0), added, channel)


def _taken(x: jax.Array, index: jax.Array) -> jax.Array:
    """Gather channels of ``x`` as columns of a matrix, which is faster on CPU."""
    return materialize(jnp.take(_rows(x), index, axis=1, mode="clip")).reshape(*x.shape[:-1], index.shape[0])


def _added(x: jax.Array, changes: jax.Array, index: jax.Array) -> jax.Array:
    """Add ``changes`` to channels of ``x``; the transpose of `_taken`."""
    return _rows(x).at[:, index].add(materialize(_rows(changes)), mode="clip").reshape(x.shape)


def _rows(x: jax.Array) -> jax.Array:
    """Reshape ``[..., C]`` to a matrix with ``C`` columns."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
