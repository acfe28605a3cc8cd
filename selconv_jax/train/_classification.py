"""Loss and top-1 and top-5 accuracy of a batch of logits."""

import jax
import jax.numpy as jnp
import optax

from selconv_jax.train._state import Totals

__all__ = ["classification_totals"]

Array = jax.Array


def classification_totals(logits: Array, labels: Array, counts: Array) -> Totals:
    """Sum the losses and correct predictions of a batch.

    Classes are ranked by descending logit, ties by ascending class. NaN logits rank before the true class,
    so that a diverged network never counts as correct.

    Args:
        logits: ``[N, classes]`` floating.
        labels: ``[N]`` int32.
        counts: ``[N]`` bool, mask of the examples to count.

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
