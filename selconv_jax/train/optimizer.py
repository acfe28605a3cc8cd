"""The published optimizer, as an optax chain."""

from typing import Any

import jax.numpy as jnp
import optax
from flax import traverse_util

from selconv_jax.train.config import OptimizerConfig

__all__ = ["learning_rate_schedule", "make_optimizer"]


def learning_rate_schedule(learning_rate: float, steps: int) -> optax.Schedule:
    """Cosine decay to 0 over ``steps`` steps, without warm-up."""
    cosine = optax.cosine_decay_schedule(learning_rate, steps)
    return lambda step: cosine(jnp.asarray(step, float))  # as wide as jax_enable_x64 allows


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """SGD with Nesterov momentum and two weight decays (method, "Schedule and training").

    Weight decay is added to the gradient before momentum; on shifts it is a weaker one.

    Args:
        config: Rates.
        steps: Steps of the whole run, over which the learning rate falls to 0.

    Returns:
        An optax optimizer for the ``params`` of a model.

    Example:
        >>> import jax.numpy as jnp
        >>> optimizer = make_optimizer(OptimizerConfig(), steps=100)
        >>> state = optimizer.init({"kernel": jnp.ones(2), "shift": jnp.zeros((2, 2))})
    """
    links = [
        optax.add_decayed_weights(config.weight_decay, mask=_is_not_shift),
        optax.add_decayed_weights(config.shift_weight_decay, mask=_is_shift),
        optax.sgd(
            learning_rate_schedule(config.learning_rate, steps), momentum=config.momentum, nesterov=True
        ),
    ]
    if not config.train_shift:
        links.append(optax.masked(optax.set_to_zero(), _is_shift))
    return optax.chain(*links)


def _is_shift(params: Any) -> Any:
    return traverse_util.path_aware_map(lambda path, _: path[-1] == "shift", params)


def _is_not_shift(params: Any) -> Any:
    return traverse_util.path_aware_map(lambda path, _: path[-1] != "shift", params)
