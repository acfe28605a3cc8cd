"""The pure functions that a run compiles: training steps and evaluation of a batch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from selconv_jax.data.augment import augment, normalize
from selconv_jax.data.dataset import DatasetInfo
from selconv_jax.data.mixup import draw_mixup, mix
from selconv_jax.train.state import Totals, TrainState

__all__ = ["Purpose", "classification_totals", "epoch_order", "eval_batch", "fold", "train_step"]

Array = jax.Array
ShardBatch = Callable[[Any], Any]


class Purpose:
    """What a key folded from the run's key is for, so that no two uses draw the same numbers."""

    SHUFFLE = 0
    STEP = 1
    REALLOCATION = 2
    MIXUP = 3
    CROP = 4


def fold(key: Array, purpose: int, index: int | Array) -> Array:
    """The run's key for one purpose and one step or epoch.

    Args:
        key: ``[2]`` uint32, key data.
        purpose: One of `Purpose`.
        index: Number of the step or epoch.

    Returns:
        A typed PRNG key.
    """
    return jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(key), purpose), index)


def epoch_order(key: Array, epoch: int | Array, count: int) -> Array:
    """The order ``[count]`` int32 in which an epoch takes the training images."""
    return jax.random.permutation(fold(key, Purpose.SHUFFLE, epoch), jnp.arange(count, dtype=jnp.int32))


def train_step(
    state: TrainState,
    images: Array,
    labels: Array,
    *,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    info: DatasetInfo,
    steps_per_epoch: int,
    mixup: float = 0.0,
    shard_batch: ShardBatch = lambda batch: batch,
) -> TrainState:
    """One step on a batch.

    With mixup, the loss is the weighted one of both labels of each mixed image, and a guess counts as
    right if it is the label with the larger weight.

    Args:
        state: The state before.
        images: ``[B, H, W, C]`` uint8.
        labels: ``[B]`` int32.
        model: The network.
        optimizer: The optimizer.
        info: Augmentation and normalization.
        steps_per_epoch: The totals start anew with the first step of an epoch.
        mixup: Parameter of the distribution of weights, see `selconv_jax.data.mixup`; 0: no mixup.
        shard_batch: Constrains arrays with a leading batch axis to the devices.

    Returns:
        The state after.
    """
    step_key = fold(state.key, Purpose.STEP, state.step)
    augment_key, dropout_key = jax.random.split(step_key)
    labels = shard_batch(labels)
    batch = augment(augment_key, shard_batch(images), crop_padding=info.crop_padding, flip=info.flip)
    batch = normalize(batch, info.mean, info.std, model.dtype or jnp.float32)
    counted = labels
    if mixup:
        weight, partners = draw_mixup(fold(state.key, Purpose.MIXUP, state.step), mixup, labels.shape[0])
        batch = shard_batch(mix(batch, weight, partners))
        counted = jnp.where(weight >= 0.5, labels, jnp.take(labels, partners, axis=0))

    apply: Callable[..., Any] = model.apply

    def loss_of(params: Any) -> tuple[Array, tuple[Array, Any]]:
        logits, changed = apply(
            {**state.variables, "params": params},
            batch,
            train=True,
            rngs={"dropout": dropout_key},
            mutable=["batch_stats"],
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        if mixup:
            others = jnp.take(labels, partners, axis=0)
            other_losses = optax.softmax_cross_entropy_with_integer_labels(logits, others)
            losses = weight * losses + (1 - weight) * other_losses
        return jnp.mean(losses), (logits, changed["batch_stats"])

    (loss, (logits, batch_stats)), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    starts = state.step % steps_per_epoch == 0
    totals = jax.tree.map(lambda total: jnp.where(starts, 0, total).astype(total.dtype), state.totals)
    seen = classification_totals(logits, counted, jnp.ones_like(labels, bool))
    if mixup:
        seen = dataclasses.replace(seen, loss=(loss * labels.shape[0]).astype(jnp.float32))
    failed = (state.failed_step < 0) & ~jnp.isfinite(loss)
    return dataclasses.replace(
        state,
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
        totals=totals + seen,
        failed_step=jnp.where(failed, state.step, state.failed_step),
    )


def eval_batch(
    variables: Any,
    images: Array,
    labels: Array,
    *,
    model: nn.Module,
    info: DatasetInfo,
    shard_batch: ShardBatch = lambda batch: batch,
) -> Totals:
    """Evaluates a batch.

    Args:
        variables: The model's variables.
        images: ``[B, H, W, C]`` uint8.
        labels: ``[B]`` int32; an image with a negative label is not counted.
        model: The network.
        info: Normalization.
        shard_batch: Constrains arrays with a leading batch axis to the devices.

    Returns:
        Sums over the counted images.
    """
    batch = normalize(shard_batch(images), info.mean, info.std, model.dtype or jnp.float32)
    logits: Any = model.apply(variables, batch, train=False)
    labels = shard_batch(labels)
    return classification_totals(logits, jnp.maximum(labels, 0), labels >= 0)


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
