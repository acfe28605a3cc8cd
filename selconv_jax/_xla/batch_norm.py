"""Batch norm over all axes but the last, with the method's running statistics."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from selconv_jax._xla.materialize import materialize
from selconv_jax._xla.platforms import target_platform

# So many that gathering the statistics of 256 devices takes about as long as the latency of a sum over them.
_FEW_CHANNELS = 256


def statistics_dtype(dtype: DTypeLike) -> np.dtype:
    """Return the type that statistics are computed in: float32, or ``dtype`` itself if it is wider."""
    return np.dtype(dtype if np.dtype(dtype).itemsize > 4 else np.float32)


AxisName = str | tuple[str, ...] | None


class Statistics(NamedTuple):
    """Mean and biased variance of each channel of a batch.

    Attributes:
        mean: ``[C]``, float32 or wider.
        var: ``[C]``, likewise.
    """

    mean: jax.Array
    var: jax.Array


def batch_statistics(x: jax.Array, axis_name: AxisName = None) -> Statistics:
    """Compute the mean and biased variance of each channel of a batch.

    Under ``jit`` with a sharded batch these are the statistics of the global batch.

    Args:
        x: ``[N, ..., C]`` floating.
        axis_name: Mapped axis, or several, whose members each hold an equal part of the batch; None: ``x``
            is the batch.

    Returns:
        Mean and variance ``[C]``, in float32 or wider; differentiable.

    Example:
        >>> import jax.numpy as jnp
        >>> from selconv_jax.nn import batch_statistics
        >>> mean, var = batch_statistics(jnp.array([[1.0, 10.0], [3.0, 10.0]]))
        >>> mean.tolist(), var.tolist()
        ([2.0, 10.0], [1.0, 0.0])
    """
    local = _local_statistics(x)
    if axis_name is None:
        return local
    mean = lax.pmean(local.mean, axis_name)
    return Statistics(mean, lax.pmean(local.var + jnp.square(local.mean - mean), axis_name))


@jax.custom_jvp
def _local_statistics(x: jax.Array) -> Statistics:
    """Compute the statistics of the batch that one device holds, or under ``jit`` of all of it."""
    x = x.astype(statistics_dtype(x.dtype))
    # One pass: for each image, sum the differences from its first pixel, and their squares. The difference
    # of squares then does not cancel, however far the values are from 0: the pixel is one of n values, so
    # its distance from their mean is at most sqrt(n) times their standard deviation.
    pixels = tuple(range(1, x.ndim - 1))
    pivot = lax.slice_in_dim(x, 0, 1, axis=1) if pixels else x
    for axis in pixels[1:]:
        pivot = lax.slice_in_dim(pivot, 0, 1, axis=axis)
    deviation = x - pivot
    zero = np.zeros((), x.dtype)
    sums = lax.reduce(
        (deviation, jnp.square(deviation)),
        (zero, zero),
        lambda one, other: (one[0] + other[0], one[1] + other[1]),
        pixels,
    )
    count = math.prod(x.shape[1:-1])
    # The barrier keeps the sums from being recomputed in what reads them. On a GPU, where they are not,
    # it would fix their layout and so transpose those of copies: two more kernels for each layer.
    sums = sums if target_platform() == "gpu" else lax.optimization_barrier(sums)
    offset, square = (total / count for total in sums)
    within = jnp.maximum(square - jnp.square(offset), 0)
    return _join_images(Statistics(jnp.squeeze(pivot, pixels) + offset, within))


def _join_images(each: Statistics) -> Statistics:
    """Compute the statistics of a batch ``[C]`` from those of its images ``[N, C]``.

    Of few channels, sets of images are joined pair by pair: number, mean, and sum of variances about the
    mean. Each device of a sharded batch so joins its own, and the devices exchange the results at once. The
    variance about a mean that is computed before takes two exchanges, one after the other. They carry
    fewer bytes, as what is gathered at once grows with the number of devices.
    """
    if each.mean.shape[1] > _FEW_CHANNELS:
        mean = jnp.mean(each.mean, axis=0)
        return Statistics(mean, jnp.mean(each.var + jnp.square(each.mean - mean[None]), axis=0))
    zero = np.zeros((), each.mean.dtype)

    def join(one: Sequence[jax.Array], other: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        number = one[0] + other[0]
        share = other[0] / jnp.maximum(number, 1)
        difference = other[1] - one[1]
        mean = one[1] + difference * share
        # In this order an empty set adds 0 to the total even if the square of the difference overflows.
        return number, mean, one[2] + other[2] + difference * (difference * (one[0] * share))

    _, mean, total = lax.reduce((jnp.ones_like(each.mean), *each), (zero, zero, zero), join, (0,))
    return Statistics(mean, total / len(each.mean))


@_local_statistics.defjvp
def _local_statistics_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[Statistics, Statistics]:
    # The deviations sum to 0, so the variance has no gradient through the mean. Differentiating the code
    # above would take one more pass to compute that zero.
    (x,), (change,) = primals, tangents
    statistics = _local_statistics(x)
    x, change = (array.astype(statistics.mean.dtype) for array in (x, change))
    deviation = x - lax.expand_dims(materialize(statistics.mean), _leading(x))
    return statistics, Statistics(
        jnp.mean(change, axis=_leading(x)), 2 * jnp.mean(deviation * change, axis=_leading(x))
    )


def join_statistics(*parts: Statistics) -> Statistics:
    """Join the statistics of arrays that are concatenated along their channels.

    Args:
        parts: Statistics of the arrays, in order.

    Returns:
        Statistics of the concatenation.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from selconv_jax.nn import batch_statistics, join_statistics
        >>> x, y = jnp.ones((2, 3)), jnp.zeros((2, 1))
        >>> join_statistics(batch_statistics(x), batch_statistics(y)).mean.tolist()
        [1.0, 1.0, 1.0, 0.0]
    """
    return Statistics(*(jnp.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def batch_norm(
    x: jax.Array, mean: jax.Array, var: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> jax.Array:
    """Normalize each channel and apply scale and bias.

    Args:
        x: ``[..., C]`` floating.
        mean: ``[C]``.
        var: ``[C]``, biased.
        scale: ``[C]``.
        bias: ``[C]``.
        epsilon: Added to the variance.

    Returns:
        ``[..., C]`` in the dtype of ``x``; computed in that of ``mean``.
    """
    wide, leading = x.astype(mean.dtype), _leading(x)
    factor = _factor(var, scale, epsilon)
    normalized = (wide - lax.expand_dims(mean, leading)) * lax.expand_dims(factor, leading)
    return (normalized + lax.expand_dims(bias.astype(mean.dtype), leading)).astype(x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(5,))
def batch_norm_relu(
    x: jax.Array, mean: jax.Array, var: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> jax.Array:
    """Normalize each channel, apply scale and bias, and clip at 0, for training.

    Equal to ``relu(batch_norm(...))``, with a gradient that reads ``x`` once: two sums over the batch and
    one product. The gradient through the statistics is left to `batch_statistics`, so that it is computed
    once for all layers that read the same channels.

    Args:
        x: ``[..., C]`` floating.
        mean: ``[C]``.
        var: ``[C]``, biased.
        scale: ``[C]``.
        bias: ``[C]``.
        epsilon: Added to the variance.

    Returns:
        ``[..., C]`` in the dtype of ``x``.
    """
    return jax.nn.relu(batch_norm(x, mean, var, scale, bias, epsilon))


@batch_norm_relu.defjvp
def _batch_norm_relu_jvp(
    epsilon: float, primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    x, mean, var, scale, bias = primals
    change, of_mean, of_var, of_scale, of_bias = tangents
    y = batch_norm_relu(x, mean, var, scale, bias, epsilon)

    def each(values: jax.Array) -> jax.Array:
        return lax.expand_dims(values, _leading(x))

    factor = functools.partial(_factor, epsilon=epsilon)
    times, of_times = jax.jvp(factor, (var, scale), (of_var, of_scale))
    plus = bias.astype(mean.dtype)
    # Terms that do not depend on the pixel are added first, so that their transpose is a single sum.
    of_plus = of_bias.astype(mean.dtype) - times * of_mean

    # The transposes of both terms are sums over all pixels.
    of_times, of_plus = _each_image(of_times, of_plus, x)

    # The barrier makes the gradient recompute the deviations from the input instead of storing them.
    wide, mean, times, plus = lax.optimization_barrier((x, mean, times, plus))
    deviation = wide.astype(mean.dtype) - each(mean)
    passes = deviation * each(times) + each(plus) > 0
    moved = each(times) * change.astype(mean.dtype) + deviation * of_times + of_plus
    return y, jnp.where(passes, materialize(moved), 0).astype(x.dtype)


def _each_image(one: jax.Array, other: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Broadcast two tangents ``[C]`` against ``x`` ``[N, ..., C]``, so that their transposes are fast sums.

    Except on a TPU these sum over the pixels of each image and then over the images. Of a single sum over
    everything the compiler for GPUs makes too few parts, and that of jaxlib 0.10 for CPU a slow window.
    """
    if target_platform() == "tpu":
        return lax.expand_dims(one, _leading(x)), lax.expand_dims(other, _leading(x))
    both = jnp.broadcast_to(jnp.stack((one, other)), (x.shape[0], 2, x.shape[-1]))
    one, other = lax.optimization_barrier((both[:, 0], both[:, 1]))
    pixels = tuple(range(1, x.ndim - 1))
    return lax.expand_dims(one, pixels), lax.expand_dims(other, pixels)


def _factor(var: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """Compute the factor of the deviations from the mean, ``[C]``."""
    # An overflowed variance would silently scale its channel to 0.
    inverse = jnp.where(jnp.isinf(var), jnp.nan, lax.rsqrt(var + epsilon))
    return inverse * scale.astype(var.dtype)


def _leading(x: jax.Array) -> tuple[int, ...]:
    """Return all axes but the channels'."""
    return tuple(range(x.ndim - 1))


def update_running_statistics(
    running_mean: jax.Array,
    running_var: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    count: int,
    momentum: float,
) -> tuple[jax.Array, jax.Array]:
    """Move the running statistics towards those of a batch.

    The running variance takes the unbiased estimate, ``count / (count - 1)`` times the biased one
    (method, "One selective layer", step 2).

    Args:
        running_mean: ``[C]``.
        running_var: ``[C]``.
        mean: ``[C]`` of the batch.
        var: ``[C]`` of the batch, biased.
        count: Number of values per channel in the batch. With one value the variance stays biased.
        momentum: Decay rate of the running statistics: the fraction of them that is kept.

    Returns:
        The new running mean and variance, in their old dtypes.
    """
    unbiased = var * (count / max(count - 1, 1))
    new_mean = momentum * running_mean + (1 - momentum) * mean.astype(running_mean.dtype)
    new_var = momentum * running_var + (1 - momentum) * unbiased.astype(running_var.dtype)
    return lax.stop_gradient(new_mean), lax.stop_gradient(new_var)
