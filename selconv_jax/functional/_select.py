"""Channel selection: copied channels replaced by shifted copies of their sources."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from selconv_jax._utils.arguments import check_dtype, check_whole
from selconv_jax._xla.batch_norm import AxisName, Statistics, batch_statistics
from selconv_jax._xla.materialize import materialize
from selconv_jax._xla.platforms import joins_axes, target_platform
from selconv_jax.functional._shift import channel_shift, check_shifted


def select(x: jax.Array, source: jax.Array, shift: jax.Array, copy_limit: int | None = None) -> jax.Array:
    """Replace copied channels by their shifted sources (method, "One selective layer", step 1).

    Channel ``j`` of the result is ``x_j`` where ``source[j] = -1``, else the channel ``source[j]`` shifted
    by ``shift[j]``. A channel may be a shifted copy of itself: ``source[j] = j`` differs from -1.

    The cost grows with ``copy_limit``, the number of copies that the program provides for, not with the
    number of channels. The result does not depend on it as long as it suffices.

    Args:
        x: ``[N, *S, C]`` floating.
        source: ``[C]`` int32 in ``-1 .. C - 1``.
        shift: ``[C, len(S)]`` floating, in pixels; ignored, with gradient 0, where ``source`` is -1.
        copy_limit: Upper bound of the number of copies (entries of ``source`` other than -1); None: ``C``.
            If there are more, every copy is NaN, and on a TPU every channel.

    Returns:
        ``[N, *S, C]`` in the dtype of ``x``.

    Raises:
        ConfigError: ``copy_limit`` is not a whole number of at least 0.
        ValueError: ``x`` is not floating, ``source`` not integer, or a shape does not match ``x``.

    Example:
        >>> import jax.numpy as jnp
        >>> from selconv_jax.functional import select
        >>> x = jnp.array([[[1.0, 10.0], [2.0, 20.0]]])
        >>> select(x, jnp.array([-1, 0]), jnp.array([[0.0], [1.0]]))[0].tolist()
        [[1.0, 2.0], [2.0, 2.0]]
    """
    check_dtype("source", source, np.integer, "integer")
    check_shifted(x, shift)
    if source.shape != x.shape[-1:]:
        raise ValueError(f"source has shape {source.shape}, but the input has {x.shape[-1]} channels.")
    copy_limit = _bound(copy_limit, x)
    if copy_limit == 0:
        return _fill_channels(x, source >= 0, jnp.nan)
    return _select_with_copies(x, source, shift, copy_limit)[0]


def select_with_statistics(
    x: jax.Array,
    statistics: Statistics,
    source: jax.Array,
    shift: jax.Array,
    copy_limit: int | None = None,
    axis_name: AxisName = None,
) -> tuple[jax.Array, Statistics]:
    """Select channels and derive the statistics of the result, reading only the copies.

    Args:
        x: ``[N, *S, C]`` floating.
        statistics: Statistics of ``x``, from `selconv_jax.nn.batch_statistics`.
        source: See `select`.
        shift: See `select`.
        copy_limit: See `select`.
        axis_name: Mapped axis over which ``statistics`` were computed.

    Returns:
        The result of `select`, and its statistics.
    """
    copy_limit = _bound(copy_limit, x)
    if copy_limit == 0:
        selected, *new = (_fill_channels(values, source >= 0, jnp.nan) for values in (x, *statistics))
        return selected, Statistics(*new)
    selected, copies, writes = _select_with_copies(x, source, shift, copy_limit)

    def placed(of_x: jax.Array, of_copies: jax.Array) -> jax.Array:
        return jnp.where(source >= 0, jnp.sum(jnp.where(writes, of_copies[:, None], 0), axis=0), of_x)

    return selected, Statistics(*map(placed, statistics, batch_statistics(copies, axis_name)))


def _bound(copy_limit: int | None, x: jax.Array) -> int:
    """Resolve ``copy_limit`` to the number of copies that the program provides for."""
    if copy_limit is None:
        return x.shape[-1]
    check_whole("copy_limit", copy_limit, 0, "a whole number of channels, at least 0, or None")
    return min(copy_limit, x.shape[-1])


def _fill_channels(x: jax.Array, channels: jax.Array, value: float) -> jax.Array:
    """Fill the channels of ``x`` ``[..., C]`` that are true in ``channels`` ``[C]`` with one value."""
    return jnp.where(lax.expand_dims(channels, range(x.ndim - 1)), np.asarray(value, x.dtype), x)


def _select_with_copies(
    x: jax.Array, source: jax.Array, shift: jax.Array, copy_limit: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Select; also return the copies ``[N, *S, copy_limit]``, and a mask of the channels that they replace.

    The mask is ``[copy_limit, C]``.
    """
    channels = x.shape[-1]
    is_copy = source >= 0
    number = _copy_index(is_copy)
    writes = is_copy[None, :] & (number[None, :] == jnp.arange(copy_limit)[:, None])
    # Unused copies read channel 0 and are written nowhere.
    # The barrier keeps the compiler from recomputing the indices for every pixel that a gather reads.
    origin = lax.optimization_barrier(jnp.sum(jnp.where(writes, source[None, :], 0), axis=1))
    # As a product this would be a kernel of its own on accelerators.
    displacement = jnp.sum(jnp.where(writes[:, :, None], shift[None], 0), axis=1)
    if copy_limit < channels:
        # One copy too many makes the displacement, and so the output, of all copies NaN: an overflow cannot
        # pass for a result, and the check costs nothing per pixel.
        fits = jnp.sum(is_copy) <= copy_limit
        displacement = jnp.where(fits, displacement, np.asarray(np.nan, shift.dtype))
    if target_platform() != "tpu":
        copies = channel_shift(_gather(x, origin), displacement)
        return _write(x, copies, source, writes), copies, writes
    one_hot = jax.nn.one_hot(origin, channels, dtype=x.dtype, axis=0)
    copies = channel_shift(jnp.dot(x, one_hot, precision=lax.Precision.HIGHEST), displacement)
    selected = _fill_channels(x, is_copy, 0) + jnp.dot(
        copies, writes.astype(x.dtype), precision=lax.Precision.HIGHEST
    )
    return selected, copies, writes


def _copy_index(is_copy: jax.Array) -> jax.Array:
    """Number the copies in the order of their channels, from 0: ``[C]`` int32; of use only for copies."""
    channel = jnp.arange(is_copy.shape[0])
    # Comparing all pairs makes a smaller program than a cumulative sum and its inverse.
    return jnp.sum(is_copy[None, :] & (channel[None, :] < channel[:, None]), axis=1)


@jax.custom_jvp
def _gather(x: jax.Array, origin: jax.Array) -> jax.Array:
    """Gather the channels ``origin`` ``[copy_limit]`` of ``x``; the gradient is a product, not a scatter."""
    return _take_columns(x, origin)


@_gather.defjvp
def _gather_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, Any]
) -> tuple[jax.Array, jax.Array]:
    x, origin = primals
    of_x, _ = tangents
    copy_limit, channels = origin.shape[0], x.shape[-1]
    # Copies share sources. The gradient sums the copies of each source into the first of them, by a product
    # as wide as the copies, and then gathers: no product with all channels, and no scatter. The tangent is
    # the transpose.
    copy = jnp.arange(copy_limit)
    reads = origin[:, None] == jnp.arange(channels)[None, :]  # [copy_limit, channels]
    first = lax.optimization_barrier(jnp.min(jnp.where(reads, copy[:, None], copy_limit), axis=0))
    of_sources = _fill_channels(of_x, first == copy_limit, 0)
    of_firsts = _add_columns(jnp.zeros((*x.shape[:-1], copy_limit), x.dtype), of_sources, first)
    # Rows are the first copies of each source.
    matrix = (first[origin][None, :] == copy[:, None]).astype(x.dtype)
    return _gather(x, origin), jnp.dot(of_firsts, matrix, precision=lax.Precision.HIGHEST)


@jax.custom_jvp
def _write(x: jax.Array, copies: jax.Array, source: jax.Array, writes: jax.Array) -> jax.Array:
    """Write the copies into their channels of ``x``; both this and its gradient only gather channels."""
    place = lax.optimization_barrier(_copy_index(source >= 0))  # out of range where nothing is written
    is_copy = lax.expand_dims(source >= 0, range(x.ndim - 1))
    return jnp.where(is_copy, jnp.take(materialize(copies), place, axis=-1, mode="clip"), x)


@_write.defjvp
def _write_jvp(primals: tuple[jax.Array, ...], tangents: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
    _, _, source, writes = primals
    of_x, of_copies, *_ = tangents
    channel = jnp.sum(jnp.where(writes, jnp.arange(writes.shape[1])[None, :], 0), axis=1)  # [copy_limit]
    channel = lax.optimization_barrier(channel)
    # Unused copies have read channel 0, so their tangents must not be added to it. The tangent is a
    # scatter so that its transpose, the gradient, is a gather.
    added = _fill_channels(of_copies, ~jnp.any(writes, axis=1), 0)
    return _write(*primals), _add_columns(_fill_channels(of_x, source >= 0, 0), added, channel)


def _take_columns(x: jax.Array, index: jax.Array) -> jax.Array:
    """Gather channels of ``x``."""
    if _is_flat(x):
        taken = jnp.take(x.reshape(-1), _places(x, index), mode="clip")
    else:
        taken = jnp.take(_rows(x), index, axis=1, mode="clip")
    return materialize(taken).reshape(*x.shape[:-1], index.shape[0])


def _add_columns(x: jax.Array, changes: jax.Array, index: jax.Array) -> jax.Array:
    """Add ``changes`` to channels of ``x``; the transpose of `_take_columns`."""
    changes = materialize(_rows(changes))
    if _is_flat(x):
        return x.reshape(-1).at[_places(x, index)].add(changes, mode="clip").reshape(x.shape)
    return _rows(x).at[:, index].add(changes, mode="clip").reshape(x.shape)


def _is_flat(x: jax.Array) -> bool:
    """Check whether to gather single numbers of ``x``.

    The CPU compiler gathers columns in the order of the columns and so reads the whole array for each. An
    array that is spread over devices would be collected, and one of symbolic size has no largest index.
    """
    known = all(isinstance(size, int) for size in x.shape)
    return jax.device_count() == 1 and joins_axes(x) and known and x.size < 2**31


def _places(x: jax.Array, index: jax.Array) -> jax.Array:
    """Compute the places of columns in the flat ``x``: int32 ``[rows, len(index)]``."""
    rows, channels = math.prod(x.shape[:-1]), x.shape[-1]
    column = jnp.clip(index, 0, channels - 1).astype(jnp.int32)
    return jnp.arange(rows, dtype=jnp.int32)[:, None] * channels + column[None, :]


def _rows(x: jax.Array) -> jax.Array:
    """Reshape ``[..., C]`` to a matrix with ``C`` columns."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
