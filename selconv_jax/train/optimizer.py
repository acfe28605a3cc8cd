"""The published optimizer, or another of optax, as an optax chain."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from selconv_jax.errors import ConfigError, nearest
from selconv_jax.train.config import OptimizerConfig

__all__ = ["learning_rate_schedule", "make_optimizer"]


def learning_rate_schedule(
    config: OptimizerConfig, steps: int, *, steps_per_epoch: int = 1, batch_size: int | None = None
) -> optax.Schedule:
    """The learning rate of every step: a rise in proportion to the step, then a cosine that ends at 0.

    Args:
        config: Rates.
        steps: Steps of the run.
        steps_per_epoch: Steps of an epoch, the unit of the warm-up.
        batch_size: Images per step, to which a rate for another size is scaled; None: not scaled.

    Returns:
        From the number of a step to its rate.
    """
    peak = config.learning_rate
    if config.reference_batch_size is not None and batch_size is not None:
        peak *= batch_size / config.reference_batch_size
    warmup = round(config.warmup_epochs * steps_per_epoch)
    cosine = optax.cosine_decay_schedule(peak, max(steps - warmup, 1))

    def rate(step: Any) -> jax.Array:
        step = jnp.asarray(step, float)  # as wide as jax_enable_x64 allows
        if not warmup:
            return cosine(step)
        return jnp.where(step < warmup, peak * (step + 1) / (warmup + 1), cosine(step - warmup))

    return rate


def make_optimizer(
    config: OptimizerConfig, steps: int, schedule: optax.Schedule | None = None
) -> optax.GradientTransformation:
    """SGD with Nesterov momentum and two weight decays (method, "Schedule and training"), or another.

    Weight decay is added to the gradient before anything else; on shifts it is a weaker one. Of ``"lars"``,
    kernels alone are scaled by the ratio of norms, as is usual.

    Args:
        config: Name and rates.
        steps: Steps of the whole run, over which the learning rate falls to 0.
        schedule: The learning rate; None: that of `learning_rate_schedule`.

    Returns:
        An optax optimizer for the ``params`` of a model.

    Raises:
        ConfigError: There is no optimizer of that name, or it has no such option.

    Example:
        >>> import jax.numpy as jnp
        >>> optimizer = make_optimizer(OptimizerConfig(), steps=100)
        >>> state = optimizer.init({"kernel": jnp.ones(2), "shift": jnp.zeros((2, 2))})
    """
    schedule = schedule or learning_rate_schedule(config, steps)
    links = [
        optax.add_decayed_weights(config.weight_decay, mask=_is_not_shift),
        optax.add_decayed_weights(config.shift_weight_decay, mask=_is_shift),
        _by_name(config, schedule),
    ]
    if not config.train_shift:
        links.append(optax.masked(optax.set_to_zero(), _is_shift))
    return optax.chain(*links)


def _by_name(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    name = config.name
    makers = _makers()
    if name not in makers:
        raise ConfigError(
            f"optimizer.name is {name!r}, which is no optimizer of optax. {nearest(name, makers)}"
        )
    options = dict(config.options)
    known = [key for key in inspect.signature(makers[name]).parameters if key != "learning_rate"]
    for key in options:
        if key not in known:
            raise ConfigError(f"optimizer.options.{key}: {name} has no such option. {nearest(key, known)}")
    if name in ("sgd", "lars"):
        options = {"momentum": config.momentum, "nesterov": True, **options}
    if name == "lars":
        options = {"weight_decay": 0.0, "trust_ratio_mask": _is_kernel, **options}
    try:
        return makers[name](schedule, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer.options do not suit {name}: {error}") from None


def _makers() -> dict[str, Callable[..., optax.GradientTransformation]]:
    """The functions of optax that make an optimizer of a learning rate."""
    makers: dict[str, Callable[..., optax.GradientTransformation]] = {}
    for name in dir(optax):
        value = getattr(optax, name)
        if (
            inspect.isfunction(value)
            and next(iter(inspect.signature(value).parameters), "") == "learning_rate"
        ):
            makers[name] = value
    return makers


def _is_shift(params: Any) -> Any:
    return traverse_util.path_aware_map(lambda path, _: path[-1] == "shift", params)


def _is_not_shift(params: Any) -> Any:
    return traverse_util.path_aware_map(lambda path, _: path[-1] != "shift", params)


def _is_kernel(params: Any) -> Any:
    return traverse_util.path_aware_map(lambda path, _: path[-1] == "kernel", params)
