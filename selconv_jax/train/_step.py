"""The pure functions that a run compiles: a training step, and the evaluation of a batch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from selconv_jax.data._augment import augment, draw_mixup, mix, normalize
from selconv_jax.data._dataset import DatasetInfo
from selconv_jax.train._classification import classification_totals
from selconv_jax.train._distributed.sharding import Placement
from selconv_jax.train._gradients import BatchNormScope, Examples, Mixture, batch_gradients
from selconv_jax.train._state import Totals, TrainState

__all__ = ["Purpose", "epoch_order", "eval_batch", "fold", "train_step"]

Array = jax.Array
ShardBatch = Callable[[Any], Any]


class Purpose:
    """Purposes of keys folded from the run's key, so that no two uses draw the same numbers."""

    SHUFFLE = 0
    STEP = 1
    REALLOCATION = 2
    MIXUP = 3
    CROP = 4


def fold(key: Array, purpose: int, index: int | Array) -> Array:
    """Derive a key for one purpose and one step or epoch from the run's key.

    Args:
        key: ``[2]`` uint32, key data.
        purpose: One of `Purpose`.
        index: Index of the step or epoch.

    Returns:
        A typed PRNG key.
    """
    return jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(key), purpose), index)


def epoch_order(key: Array, epoch: int | Array, count: int) -> Array:
    """Draw the order ``[count]`` int32 of the training images in an epoch."""
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
    micro_batches: int = 1,
    placement: Placement | None = None,
    batch_norm: BatchNormScope = "global",
) -> TrainState:
    """Make one training step on a batch.

    With mixup, the loss is weighted over both labels of each mixed image, and a prediction counts as
    correct if it is the label with the larger weight.

    Args:
        state: The state before.
        images: ``[B, H, W, C]`` uint8.
        labels: ``[B]`` int32.
        model: The network.
        optimizer: The optimizer.
        info: Augmentation and normalization.
        steps_per_epoch: The totals are reset at the first step of each epoch.
        mixup: Parameter of the distribution of weights, see `draw_mixup`; 0: no mixup.
        micro_batches: See `accumulated_gradients`.
        placement: The devices; None: one.
        batch_norm: See `batch_gradients`.

    Returns:
        The state after.
    """
    shard_batch: ShardBatch = placement.shard_batch if placement else lambda batch: batch
    step_key = fold(state.key, Purpose.STEP, state.step)
    augment_key, dropout_key = jax.random.split(step_key)
    labels = shard_batch(labels)
    batch = augment(augment_key, shard_batch(images), crop_padding=info.crop_padding, flip=info.flip)
    batch = normalize(batch, info.mean, info.std, model.dtype or jnp.float32)
    mixture = None
    if mixup:
        weight, partners = draw_mixup(fold(state.key, Purpose.MIXUP, state.step), mixup, labels.shape[0])
        batch = shard_batch(mix(batch, weight, partners))
        others = shard_batch(jnp.take(labels, partners, axis=0))
        mixture = Mixture(others, jnp.broadcast_to(weight, labels.shape))
    grads, seen = batch_gradients(
        model,
        state.variables,
        Examples(batch, labels, mixture),
        dropout_key,
        micro_batches=micro_batches,
        placement=placement,
        batch_norm=batch_norm,
    )
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    starts = state.step % steps_per_epoch == 0
    totals = jax.tree.map(lambda total: jnp.where(starts, 0, total).astype(total.dtype), state.totals)
    failed = (state.failed_step < 0) & ~jnp.isfinite(seen.totals.loss)
    return dataclasses.replace(
        state,
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        batch_stats=seen.batch_stats,
        opt_state=opt_state,
        totals=totals + seen.totals,
        failed_step=jnp.where(failed, state.step, state.failed_step),
        changed=jnp.where(starts, 0, state.changed),
    )


def eval_batch(
    variables: Any,
    images: Array,
    labels: Array,
    *,
    model: nn.Module,
    info: DatasetInfo,
    placement: Placement | None = None,
) -> Totals:
    """Evaluate a batch.

    Args:
        variables: The model's variables.
        images: ``[B, H, W, C]`` uint8.
        labels: ``[B]`` int32; an image with a negative label is not counted.
        model: The network.
        info: Normalization.
        placement: The devices; None: one.

    Returns:
        Sums over the counted images.
    """
    shard_batch: ShardBatch = placement.shard_batch if placement else lambda batch: batch
    batch = normalize(shard_batch(images), info.mean, info.std, model.dtype or jnp.float32)
    logits: Any = model.apply(variables, batch, train=False)
    labels = shard_batch(labels)
    return classification_totals(logits, jnp.maximum(labels, 0), labels >= 0)
