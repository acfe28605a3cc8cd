"""What a batch of logits amounts to: losses and right guesses."""

import jax
import jax.numpy as jnp
import optax

from selconv_jax.train._state import Totals

__all__ = ["classification_totals"]

Array = jax.Array


def classification_totals(logits: Array, labels: Array, counts: Array) -> Totals:
    """Sums the losses and right guesses of a batch.

    The classes are guessed by falling logit, of equal ones the lower class first. Logits that are NaN
    come before the true class, so that a broken network is never called right.

    Args:
        logits: ``[N, classes]`` floating.
        labels: ``[N]`` int32.
        counts: ``[N]`` bool, which examples count.

    Returns:
        Sums over the counted examples.
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    true = jnp.take_along_axis(logits, labels[:, None], axis=1)
    classes = jnp.arange(logits.shape[1], dtype=labels.dtype)[None, :]
    ahead = ~(logits <= true) | ((logits == true) & (classes < labels[:, None]))
    rank = jnp.sum(ahead, axis=1)
    return Totals(
        loss=jnp.sum(jnp.where(counts, losses, 0)).astype(jnp.float32),
        correct=jnp.sum(counts & (rank < 1), dtype=jnp.int32),
        correct_top5=jnp.sum(counts & (rank < 5), dtype=jnp.int32),
        count=jnp.sum(counts, dtype=jnp.int32),
    )
