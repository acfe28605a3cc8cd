"""Gradients over devices, with accumulation; batch norm over all devices or over each."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec

from selconv_jax._xla.platforms import target_platform
from selconv_jax.train._distributed.sharding import BATCH_AXES, Placement
from selconv_jax.train._state import Totals, classification_totals

Array = jax.Array
BatchNormScope: TypeAlias = Literal["global", "per_device"]


class Mixture(NamedTuple):
    """The second labels ``[B]`` int32 of a batch after mixup, and the weights ``[B]`` of the first ones."""

    others: Array
    weight: Array


class Examples(NamedTuple):
    """A batch as a network takes it: images ``[B, H, W, C]``, normalized, and labels ``[B]`` int32."""

    images: Array
    labels: Array
    mixture: Mixture | None = None


class Seen(NamedTuple):
    """Results of the forward pass other than the gradient: updated running statistics, losses, accuracy."""

    batch_stats: Any
    totals: Totals


def batch_gradients(
    model: nn.Module,
    variables: Any,
    examples: Examples,
    dropout_key: Array,
    *,
    micro_batches: int = 1,
    placement: Placement | None = None,
    batch_norm: BatchNormScope = "global",
) -> tuple[Any, Seen]:
    """Compute the gradient of the mean loss of a batch that is split over devices.

    Batch norm ``"global"`` takes the statistics of the whole (micro-)batch over all devices, by collectives
    in every layer, forward and backward. With ``"per_device"``, each device normalizes with the statistics of
    its own examples; running statistics are updated with the mean over the devices. A step then has two
    all-reduces, one for the gradient and one for everything else.
    """
    if batch_norm == "global" or placement is None or placement.mesh.size == 1:
        return accumulated_gradients(model, variables, examples, dropout_key, micro_batches, placement)
    devices = placement.mesh.size

    def of_device(variables: Any, examples: Examples, key_data: Array) -> tuple[Any, Seen]:
        key = jax.random.fold_in(jax.random.wrap_key_data(key_data), jax.lax.axis_index(BATCH_AXES))
        grads, seen = accumulated_gradients(model, variables, examples, key, micro_batches)
        grads, batch_stats = jax.tree.map(lambda leaf: leaf / devices, (grads, seen.batch_stats))
        return _sum_of_devices(grads), _sum_of_devices(Seen(batch_stats, seen.totals))

    whole, split = PartitionSpec(), PartitionSpec(BATCH_AXES)
    # With check_vma, shard_map would sum the gradients of replicated arrays itself, one all-reduce each.
    return jax.shard_map(
        of_device, mesh=placement.mesh, in_specs=(whole, split, whole), out_specs=whole, check_vma=False
    )(variables, examples, jax.random.key_data(dropout_key))


def accumulated_gradients(
    model: nn.Module,
    variables: Any,
    examples: Examples,
    dropout_key: Array,
    micro_batches: int,
    placement: Placement | None = None,
) -> tuple[Any, Seen]:
    """Compute the gradient of the mean loss of a batch by gradient accumulation.

    Micro-batch ``i`` holds every ``micro_batches``-th example from the ``i``-th on, so that every device
    holds a part of each. Batch norm normalizes each micro-batch with its own statistics, and updates the
    running statistics once for each.
    """
    if micro_batches == 1:
        return _gradient(model, variables, examples, dropout_key)

    def part(x: Array, number: Array) -> Array:
        rows = x.reshape(x.shape[0] // micro_batches, micro_batches, *x.shape[1:])
        taken = jax.lax.dynamic_index_in_dim(rows, number, axis=1, keepdims=False)
        return placement.shard_batch(taken) if placement else taken

    def body(done: tuple[Any, Seen], number: Array) -> tuple[tuple[Any, Seen], None]:
        grads, seen = done
        more, then = _gradient(
            model,
            {**variables, "batch_stats": seen.batch_stats},
            jax.tree.map(lambda x: part(x, number), examples),
            jax.random.fold_in(dropout_key, number),
        )
        grads = jax.tree.map(lambda total, grad: total + grad / micro_batches, grads, more)
        return (grads, Seen(then.batch_stats, seen.totals + then.totals)), None

    start = jax.tree.map(jnp.zeros_like, variables["params"]), Seen(variables["batch_stats"], Totals.zero())
    # XLA runs convolutions inside a loop slowly on CPU.
    unroll = micro_batches if target_platform() == "cpu" else 1
    return jax.lax.scan(body, start, jnp.arange(micro_batches), unroll=unroll)[0]


def _gradient(model: nn.Module, variables: Any, examples: Examples, dropout_key: Array) -> tuple[Any, Seen]:
    apply: Callable[..., Any] = model.apply
    labels, mixture = examples.labels, examples.mixture

    def loss_of(params: Any) -> tuple[Array, tuple[Array, Any]]:
        logits, changed = apply(
            {**variables, "params": params},
            examples.images,
            train=True,
            rngs={"dropout": dropout_key},
            mutable=["batch_stats"],
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        if mixture is not None:
            others = optax.softmax_cross_entropy_with_integer_labels(logits, mixture.others)
            losses = mixture.weight * losses + (1 - mixture.weight) * others
        return jnp.mean(losses), (logits, changed["batch_stats"])

    (loss, (logits, batch_stats)), grads = jax.value_and_grad(loss_of, has_aux=True)(variables["params"])
    counted = labels if mixture is None else jnp.where(mixture.weight >= 0.5, labels, mixture.others)
    totals = classification_totals(logits, counted, jnp.ones_like(labels, bool))
    if mixture is not None:
        totals = dataclasses.replace(totals, loss=(loss * labels.shape[0]).astype(jnp.float32))
    return grads, Seen(batch_stats, totals)


def _sum_of_devices(tree: Any) -> Any:
    """Sum over all devices in one all-reduce; integers are exact below 2^24."""
    dtypes = [jnp.dtype(jnp.float32), *(leaf.dtype for leaf in jax.tree.leaves(tree))]
    widest = max(
        (each for each in dtypes if jnp.issubdtype(each, jnp.floating)), key=lambda each: each.itemsize
    )
    flat, unravel = ravel_pytree(jax.tree.map(lambda leaf: leaf.astype(widest), tree))
    summed = unravel(jax.lax.psum(flat, BATCH_AXES))
    return jax.tree.map(lambda total, leaf: total.astype(leaf.dtype), summed, tree)
