"""Mixup: train on weighted sums of pairs of images (Zhang et al., 2018, arXiv:1710.09412)."""

import jax
import jax.numpy as jnp

__all__ = ["draw_mixup", "mix"]


def draw_mixup(key: jax.Array, alpha: float, batch_size: int) -> tuple[jax.Array, jax.Array]:
    """Draw one weight for the batch and a partner for each of its images.

    Args:
        key: PRNG key.
        alpha: Both parameters of the beta distribution of the weight, above 0.
        batch_size: Number of images.

    Returns:
        The weight of the images, ``[]`` float32 in [0, 1], where partners have the rest; and the indices of
        the partners, a permutation, int32 ``[batch_size]``.

    Example:
        >>> weight, partners = draw_mixup(jax.random.key(0), 1.0, 4)
        >>> bool(0 <= weight <= 1), sorted(partners.tolist())
        (True, [0, 1, 2, 3])
    """
    weight_key, partner_key = jax.random.split(key)
    weight = jax.random.beta(weight_key, alpha, alpha, dtype=jnp.float32)
    return weight, jax.random.permutation(partner_key, jnp.arange(batch_size, dtype=jnp.int32))


def mix(x: jax.Array, weight: jax.Array, partners: jax.Array) -> jax.Array:
    """Mix images with their partners.

    Args:
        x: ``[B, ...]`` floating.
        weight: ``[]`` float32.
        partners: int32 ``[B]``.

    Returns:
        ``weight * x + (1 - weight) * x[partners]``, computed in float32, of the shape and dtype of ``x``.

    Example:
        >>> mix(jnp.array([0.0, 4.0]), jnp.float32(0.75), jnp.array([1, 0])).tolist()
        [1.0, 3.0]
    """
    own, other = x.astype(jnp.float32), jnp.take(x, partners, axis=0).astype(jnp.float32)
    return (weight * own + (1 - weight) * other).astype(x.dtype)
