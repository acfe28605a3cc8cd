"""The published optimizer, or another of optax, as an optax chain."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from selconv_jax.errors import ConfigError, nearest
from selconv_jax.train._config import OptimizerConfig

_KINDS = {bool: "true or false", int: "a number", float: "a number", str: "a text"}


def learning_rate_schedule(
    config: OptimizerConfig, steps: int, *, steps_per_epoch: int = 1, batch_size: int | None = None
) -> optax.Schedule:
    """Make the learning-rate schedule of a run of ``steps``: a linear warm-up, then a cosine decay to 0.

    A rate for another ``batch_size`` is scaled to it; None: not scaled.
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
    """Make the optimizer: by default SGD with two weight decays (method, "Schedule and training").

    SGD has Nesterov momentum. Weight decay is added to the gradient first; shifts have a weaker one. An
    optimizer with its own decay (an argument ``weight_decay``, as in ``"adamw"``, ``"lion"`` or ``"lamb"``)
    gets these values instead, and nothing is added: it decays once. Shifts then have a separate instance;
    if the optimizer takes no mask, one instance decays shifts like the rest. ``"lars"`` scales only kernels
    by the trust ratio, as is usual.

    The learning rate is the schedule, by default that of `learning_rate_schedule` over the steps of the run.
    """
    schedule = schedule or learning_rate_schedule(config, steps)
    name, maker = _maker(config.name)
    parameters = inspect.signature(maker).parameters
    options = _options(dataclasses.replace(config, name=name), parameters)
    decays = [key for key in parameters if key.endswith("weight_decay")]

    def make(**options: Any) -> optax.GradientTransformation:
        try:
            return maker(schedule, **options)
        except Exception as error:  # optax raises nearly any exception for a value of the wrong type
            raise ConfigError(unusable(config.name).format(error)) from None

    links = [make(**{**dict.fromkeys(decays, config.weight_decay), **options})]
    if decays and {"mask", "weight_decay_mask"} & parameters.keys():
        of_shifts = make(**{**options, **dict.fromkeys(decays, config.shift_weight_decay)})
        groups = _by_name(lambda name: "shift" if name == "shift" else "other")
        links = [optax.partition({"shift": of_shifts, "other": links[0]}, groups)]
    elif not decays and "weight_decay_rate" not in options:  # the decay of adafactor, off unless it is set
        links = [
            optax.add_decayed_weights(config.weight_decay, mask=_by_name(lambda name: name != "shift")),
            optax.add_decayed_weights(config.shift_weight_decay, mask=_IS_SHIFT),
            *links,
        ]
    if not config.train_shift:
        links.append(optax.masked(optax.set_to_zero(), _IS_SHIFT))
    return optax.chain(*links)


def finds_its_rate(name: str) -> bool:
    """Return whether an optimizer estimates its learning rate; the given one multiplies it, by 1 in optax."""
    _, maker = _maker(name)
    return inspect.signature(maker).parameters["learning_rate"].default == 1.0


def unusable(name: str) -> str:
    """Word the refusal of an optimizer that cannot be made; the reason goes in place of ``{}``."""
    return (
        f"optimizer.name is {name!r}, which cannot be used with a learning-rate schedule, or not with these "
        "optimizer.options ({}). Choose another optimizer, or other options."
    )


def _maker(name: str) -> tuple[str, Callable[..., optax.GradientTransformation]]:
    """Find the function of optax or optax.contrib that makes an optimizer from a learning rate.

    Returns:
        Its name without that of the module, and the function.
    """
    makers: dict[str, Callable[..., optax.GradientTransformation]] = {}
    for module in (optax.contrib, optax):
        for key, value in vars(module).items():
            # The others are components of optimizers, or deprecated aliases.
            offered = not key.startswith(("_", "scale_by_")) and not hasattr(module, f"{key}_v2")
            parameters = inspect.signature(value).parameters if inspect.isfunction(value) else ()
            if offered and next(iter(parameters), "") == "learning_rate":
                makers[key] = value
    key = name.removeprefix("optax.")
    if key.startswith("contrib.") and hasattr(optax.contrib, key.removeprefix("contrib.")):
        key = key.removeprefix("contrib.")
    if key not in makers:
        raise ConfigError(
            f"optimizer.name is {name!r}, which is no optimizer of optax. {nearest(key, makers)}"
        )
    return key, makers[key]


def _options(config: OptimizerConfig, parameters: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """Collect the optimizer's arguments other than rate and decays; each has the type of its default."""
    known = parameters.keys() - {"learning_rate"}
    for key, value in config.options.items():
        where = f"optimizer.options.{key}"
        if key not in known:
            raise ConfigError(f"{where}: {config.name} has no such option. {nearest(key, known)}")
        kind = type(parameters[key].default)
        kinds = (int, float) if kind in (int, float) else (kind,) if kind in (bool, str) else None
        if kinds is not None and type(value) not in kinds:
            raise ConfigError(
                f"{where} is {value!r}; it must be {_KINDS[kind]}, such as {parameters[key].default!r}."
            )
    defaults: dict[str, Any] = {}
    if config.name in ("sgd", "lars"):
        defaults = {"momentum": config.momentum, "nesterov": True}
    if config.name == "lars":
        defaults |= {"trust_ratio_mask": _by_name(lambda name: name == "kernel")}
    return {**defaults, **config.options}


def _by_name(function: Callable[[str], Any]) -> Callable[[Any], Any]:
    """Map parameters by name; `optax.tree.map_params` passes a single value in place of the tree."""

    def of_params(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: function(getattr(path[-1], "key", "") if path else ""), params
        )

    return of_params


_IS_SHIFT = _by_name(lambda name: name == "shift")
