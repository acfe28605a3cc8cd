"""Batch norm over every dimension but the last, with the method's running statistics."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

__all__ = ["batch_norm", "batch_statistics", "statistics_dtype", "update_running_statistics"]


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
