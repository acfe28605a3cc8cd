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
from selconv_jax.train.state import Totals, TrainState

__all__ = ["Purpose", "classification_totals", "epoch_order", "eval_batch", "fold", "train_step"]

Array = jax.Array
ShardBatch = Callable[[Any], Any]


class Purpose:
    """What a key folded from the run's key is for, so that no two uses draw the same numbers."""

    SHUFFLE = 0
    STEP = 1
    REALLOCATION = 2


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
    order: Array,
    *,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    info: DatasetInfo,
    batch_size: int,
    shard_batch: ShardBatch = lambda batch: batch,
) -> TrainState:
    """One step on the batch that the state's position in the data asks for.

    The last images of an epoch's order that do not fill a batch are left out; as the order is drawn
    anew, each epoch leaves out others.

    Args:
        state: The state before.
        images: ``[N, H, W, C]`` uint8, all training images.
        labels: ``[N]`` int32.
        order: ``[N]`` int32 from `epoch_order`.
        model: The network.
        optimizer: The optimizer.
        info: Augmentation and normalization.
        batch_size: Images per step.
        shard_batch: Constrains arrays with a leading batch axis to the devices.

    Returns:
        The state after; the totals start anew with the first step of an epoch.
    """
    step_key = fold(state.key, Purpose.STEP, state.step)
    augment_key, dropout_key = jax.random.split(step_key)
    position = state.step % (order.shape[0] // batch_size)
    index = jax.lax.dynamic_slice_in_dim(order, position * batch_size, batch_size)
    batch_labels = shard_batch(jnp.take(labels, index, axis=0))
    batch = shard_batch(jnp.take(images, index, axis=0))
    batch = augment(augment_key, batch, crop_padding=info.crop_padding, flip=info.flip)
    batch = normalize(batch, info.mean, info.std, model.dtype or jnp.float32)

    apply: Callable[..., Any] = model.apply

    def loss_of(params: Any) -> tuple[Array, tuple[Array, Any]]:
        logits, changed = apply(
            {**state.variables, "params": params},
            batch,
            train=True,
            rngs={"dropout": dropout_key},
            mutable=["batch_stats"],
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch_labels)
        return jnp.mean(losses), (logits, changed["batch_stats"])

    (loss, (logits, batch_stats)), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    totals = jax.tree.map(lambda total: jnp.where(position == 0, 0, total).astype(total.dtype), state.totals)
    failed = (state.failed_step < 0) & ~jnp.isfinite(loss)
    return dataclasses.replace(
        state,
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
        totals=totals + classification_totals(logits, batch_labels, jnp.ones_like(batch_labels, bool)),
        failed_step=jnp.where(failed, state.step, state.failed_step),
    )


def eval_batch(
    variables: Any,
    images: Array,
    labels: Array,
    start: Array,
    *,
    model: nn.Module,
    info: DatasetInfo,
    batch_size: int,
    shard_batch: ShardBatch = lambda batch: batch,
) -> Totals:
    """Evaluates the images ``start .. start + batch_size``; those past the end are not counted.

    Args:
        variables: The model's variables.
        images: ``[N, H, W, C]`` uint8.
        labels: ``[N]`` int32.
        start: ``[]`` int32.
        model: The network.
        info: Normalization.
        batch_size: Images per call.
        shard_batch: Constrains arrays with a leading batch axis to the devices.

    Returns:
        Sums over the images that exist.
    """
    index = start + jnp.arange(batch_size, dtype=jnp.int32)
    exists = index < images.shape[0]
    index = jnp.minimum(index, images.shape[0] - 1)
    batch = normalize(
        shard_batch(jnp.take(images, index, axis=0)), info.mean, info.std, model.dtype or jnp.float32
    )
    logits: Any = model.apply(variables, batch, train=False)
    return classification_totals(logits, shard_batch(jnp.take(labels, index, axis=0)), exists)


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
