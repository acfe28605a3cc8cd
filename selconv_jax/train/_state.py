"""The training state: everything needed to resume a run, as one pytree."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Totals:
    """Sums over examples.

    Attributes:
        loss: ``[]`` float32, sum of the cross entropies in nats.
        correct: ``[]`` int32, examples whose top prediction is correct.
        correct_top5: ``[]`` int32, examples with the true class among the top five predictions.
        count: ``[]`` int32, examples.
    """

    loss: Array
    correct: Array
    correct_top5: Array
    count: Array

    @staticmethod
    def zero() -> "Totals":
        """Return the totals of no examples."""
        return Totals(jnp.zeros((), jnp.float32), *(jnp.zeros((), jnp.int32) for _ in range(3)))

    def __add__(self, other: "Totals") -> "Totals":
        return jax.tree.map(jnp.add, self, other)


def classification_totals(logits: Array, labels: Array, counts: Array) -> Totals:
    """Sum losses and correct predictions over the examples of a batch that the mask ``counts`` selects.

    Classes are ranked by descending logit, ties by ascending class. NaN logits rank before the true class,
    so that a diverged network never counts as correct. ``logits`` are ``[N, classes]`` floating, ``labels``
    ``[N]`` int32, ``counts`` ``[N]`` bool.
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of a run. All of it is saved; with the configuration it determines the rest of the run.

    The epoch and the position in the data follow from ``step``.

    Attributes:
        step: ``[]`` int32, training steps done.
        params: Trained parameters.
        batch_stats: Running statistics.
        selectivity: Gates and sources; empty for a plain network.
        opt_state: State of the optimizer.
        key: uint32, PRNG key data (``[2]`` by default), the same for the whole run: keys are folded from it.
        totals: Training loss and accuracy of the current epoch so far.
        failed_step: ``[]`` int32, the first step whose loss was not finite, or -1.
        changed: ``[2]`` int32, channels closed and re-allocated within the current epoch so far.
    """

    step: Array
    params: Any
    batch_stats: Any
    selectivity: Any
    opt_state: Any
    key: Array
    totals: Totals
    failed_step: Array
    changed: Array

    @property
    def variables(self) -> dict[str, Any]:
        """The model's variables."""
        return {"params": self.params, "batch_stats": self.batch_stats, "selectivity": self.selectivity}

    def with_variables(self, variables: dict[str, Any]) -> "TrainState":
        """Replace the variables of the model."""
        return dataclasses.replace(self, **variables)


def initial_state(
    model: nn.Module, optimizer: optax.GradientTransformation, image_shape: tuple[int, ...], seed: int | Array
) -> TrainState:
    """Make the state before the first step for images of ``(H, W, C)``; a pure function."""
    init_key, run_key = jax.random.split(jax.random.key(seed))
    variables = model.init(init_key, jnp.zeros((1, *image_shape), jnp.float32), train=False)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        selectivity=variables.get("selectivity", {}),
        opt_state=optimizer.init(variables["params"]),
        key=jax.random.key_data(run_key),
        totals=Totals.zero(),
        failed_step=jnp.full((), -1, jnp.int32),
        changed=jnp.zeros(2, jnp.int32),
    )
