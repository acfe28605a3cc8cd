"""Batch norm over every dimension but the last, with the method's running statistics."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from selconv_jax.platforms import target_platform
from selconv_jax.stored import stored

__all__ = [
    "batch_norm",
    "batch_norm_relu",
    "batch_statistics",
    "statistics_dtype",
    "update_running_statistics",
]


def statistics_dtype(dtype: DTypeLike) -> np.dtype:
    """The type statistics are taken in: float32, or ``dtype`` itself where that is wider."""
    return np.dtype(dtype if np.dtype(dtype).itemsize > 4 else np.float32)


def batch_statistics(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance of each channel of a batch.

    Under ``jit`` with a sharded batch these are the statistics of the global batch.

    Args:
        x: ``[..., C]`` floating.

    Returns:
        Mean and variance ``[C]``, in float32 or wider.
    """
    x = x.astype(statistics_dtype(x.dtype))
    mean = jnp.mean(x, axis=tuple(range(x.ndim - 1)))
    # Squares of differences, not the difference of squares, which cancels far from 0.
    deviation = x - lax.expand_dims(mean, range(x.ndim - 1))
    return mean, jnp.mean(jnp.square(deviation), axis=tuple(range(x.ndim - 1)))


def batch_norm(
    x: jax.Array, mean: jax.Array, var: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> jax.Array:
    """Normalizes each channel and applies scale and bias.

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
    factor = lax.rsqrt(var + epsilon) * scale.astype(var.dtype)
    wide = x.astype(mean.dtype)
    leading = range(x.ndim - 1)
    normalized = (wide - lax.expand_dims(mean, leading)) * lax.expand_dims(factor, leading)
    return (normalized + lax.expand_dims(bias.astype(mean.dtype), leading)).astype(x.dtype)


def batch_norm_relu(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Batch norm with the statistics of the batch itself, and ReLU.

    On CPU the gradient is written out: two sums over the batch and one pass, instead of what follows from
    the chain rule. As any custom gradient it has no forward mode (``jax.jvp``) there.

    Args:
        x: ``[..., C]`` floating.
        scale: ``[C]``.
        bias: ``[C]``.
        epsilon: Added to the variance.

    Returns:
        ``[..., C]`` in the dtype of ``x``, and the statistics, as of `batch_statistics`, for the running
        ones: no gradient flows through them.
    """
    if target_platform() == "cpu":
        y, mean, var = _batch_norm_relu(x, scale, bias, epsilon)
    else:
        y, mean, var = _forward(x, scale, bias, epsilon)
    return y, lax.stop_gradient(mean), lax.stop_gradient(var)


def _forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    mean, var = batch_statistics(x)
    # The deviations from the mean are computed in either pass, not stored between them.
    again = stored((mean, var))
    return jax.nn.relu(batch_norm(x, *again, scale, bias, epsilon)), mean, var


_batch_norm_relu = functools.partial(jax.custom_vjp, nondiff_argnums=(3,))(_forward)


def _forward_saving(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], Any]:
    y, mean, var = _forward(x, scale, bias, epsilon)
    return (y, mean, var), (x, mean, var, scale, bias)


def _backward(
    epsilon: float, saved: Any, cotangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, mean, var, scale, bias = saved
    cotangent = cotangents[0].astype(mean.dtype)
    axes = tuple(range(x.ndim - 1))
    count = x.size // x.shape[-1]

    def each(values: jax.Array) -> jax.Array:
        return lax.expand_dims(values.astype(mean.dtype), axes)

    inverse = lax.rsqrt(var + epsilon)
    factor = inverse * scale.astype(var.dtype)
    deviation = x.astype(mean.dtype) - each(mean)
    passed = jnp.where(deviation * each(factor) + each(bias) > 0, cotangent, 0)
    # Read three times: computed once.
    passed = lax.optimization_barrier(passed)
    of_bias = jnp.sum(passed, axis=axes)
    of_scale = jnp.sum(passed * deviation, axis=axes) * inverse
    of_x = each(factor) * passed - each(factor * of_bias / count)
    of_x = of_x - deviation * each(factor * inverse * of_scale / count)
    return of_x.astype(x.dtype), of_scale.astype(scale.dtype), of_bias.astype(bias.dtype)


_batch_norm_relu.defvjp(_forward_saving, _backward)


def update_running_statistics(
    running_mean: jax.Array,
    running_var: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    count: int,
    momentum: float,
) -> tuple[jax.Array, jax.Array]:
    """Moves the running statistics towards those of a batch.

    The running variance takes the unbiased estimate, ``count / (count - 1)`` times the biased one
    (method, "One selective layer", step 2).

    Args:
        running_mean: ``[C]``.
        running_var: ``[C]``.
        mean: ``[C]`` of the batch.
        var: ``[C]`` of the batch, biased.
        count: Number of values per channel in the batch. With one value the variance is left biased.
        momentum: Share of the running statistics that stays.

    Returns:
        The new running mean and variance, in their old dtypes.
    """
    unbiased = var * (count / max(count - 1, 1))
    new_mean = momentum * running_mean + (1 - momentum) * mean.astype(running_mean.dtype)
    new_var = momentum * running_var + (1 - momentum) * unbiased.astype(running_var.dtype)
    return lax.stop_gradient(new_mean), lax.stop_gradient(new_var)
