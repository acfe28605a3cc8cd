"""The pure functions that a run compiles: a training step, and the evaluation of a batch."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from selconv_jax.data._augment import augment, draw_mixup, mix, normalize
from selconv_jax.data._dataset import DatasetInfo
from selconv_jax.train._distributed.sharding import Placement
from selconv_jax.train._gradients import BatchNormScope, Examples, Mixture, batch_gradients
from selconv_jax.train._state import Totals, TrainState, classification_totals

Array = jax.Array


class Purpose:
    """Purposes of keys folded from the run's key, so that no two uses draw the same numbers."""

    SHUFFLE = 0
    STEP = 1
    REALLOCATION = 2
    MIXUP = 3
    CROP = 4


def fold(key: Array, purpose: int, index: int | Array) -> Array:
    """Derive a typed key for one `Purpose` and a step or epoch from the run's key data, see `TrainState`."""
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

    Images are ``[B, H, W, C]`` uint8, augmented and normalized by ``info``; labels are ``[B]`` int32. The
    totals are reset at the first step of each epoch. ``mixup`` is the parameter of the distribution of
    weights, see `draw_mixup`; 0: no mixup. For the other options see `batch_gradients`.
    """
    step_key = fold(state.key, Purpose.STEP, state.step)
    augment_key, dropout_key = jax.random.split(step_key)
    labels = _split(labels, placement)
    batch = augment(augment_key, _split(images, placement), crop_padding=info.crop_padding, flip=info.flip)
    batch = normalize(batch, info.mean, info.std, model.dtype or jnp.float32)
    mixture = None
    if mixup:
        weight, partners = draw_mixup(fold(state.key, Purpose.MIXUP, state.step), mixup, labels.shape[0])
        batch = _split(mix(batch, weight, partners), placement)
        others = _split(jnp.take(labels, partners, axis=0), placement)
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
    """Sum over the images ``[B, H, W, C]`` uint8 of a batch; those with a negative label are not counted."""
    batch = normalize(_split(images, placement), info.mean, info.std, model.dtype or jnp.float32)
    logits: Any = model.apply(variables, batch, train=False)
    labels = _split(labels, placement)
    return classification_totals(logits, jnp.maximum(labels, 0), labels >= 0)


def _split(batch: Array, placement: Placement | None) -> Array:
    return placement.shard_batch(batch) if placement else batch
