"""Abstract evaluation of a run, so that errors of its first step or round come before it starts."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from selconv_jax.errors import ConfigError, SelconvError
from selconv_jax.train._config import Config
from selconv_jax.train._optimizer import finds_its_rate, unusable
from selconv_jax.train._state import TrainState, initial_state
from selconv_jax.transforms._optimizer_state import reset_rewritten
from selconv_jax.transforms._reallocation import reallocate


def try_on_shapes(
    config: Config, model: nn.Module, optimizer: optax.GradientTransformation, image_shape: tuple[int, ...]
) -> TrainState:
    """Evaluate initialization, an optimizer step and a reset after a round on shapes alone.

    Returns the state before the first step as `jax.ShapeDtypeStruct`; a `ConfigError` says that the network
    cannot be made, or the optimizer cannot be used.
    """
    name = config.optimizer.name

    def step(params: Any, opt_state: Any) -> tuple[Any, Any]:
        updates, opt_state = optimizer.update(params, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def reset_after_round(variables: Any, opt_state: Any) -> Any:
        new, report = reallocate(variables, jax.random.key(0), config.allocation.rule)
        return reset_rewritten(optimizer, opt_state, new["params"], report)

    with _refused("the network cannot be made ({}). Choose other model.options."):
        make = functools.partial(initial_state, model, optax.identity(), image_shape, config.seed)
        state = jax.eval_shape(make)
    with _refused(unusable(name)):
        opt_state = jax.eval_shape(optimizer.init, state.params)
    if any(map(_is_schedule_free, jax.tree.leaves(opt_state, is_leaf=_is_schedule_free))):
        raise ConfigError(
            f"optimizer.name is {name!r}, whose result is an average of the networks that it trains, and not "
            "the last of them, which a run evaluates and keeps. Choose another optimizer."
        )
    with _refused(
        f"optimizer.name is {name!r}, which cannot make a step of gradients and parameters alone, or not "
        "with these optimizer.options ({}). Choose another optimizer, or other options."
    ):
        after = jax.eval_shape(step, state.params, opt_state)
        if _types(after) != _types((state.params, opt_state)):
            raise TypeError("a step changes the types of its state")

    with _refused(
        f"allocation.reset_momentum is true, but what {name} keeps cannot be reset ({{}}). Leave it out, or "
        "choose another optimizer.name."
    ):
        if config.allocation.reset_momentum and state.selectivity:
            jax.eval_shape(reset_after_round, state.variables, opt_state)
    return dataclasses.replace(state, opt_state=opt_state)


def _is_schedule_free(state: Any) -> bool:
    """Check for the state of an optimizer whose result is `optax.contrib.schedule_free_eval_params`."""
    return isinstance(state, optax.contrib.ScheduleFreeState)


def notes_on(
    config: Config,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, ...],
    devices: int,
) -> tuple[str, ...]:
    """Warn in a sentence each about settings that are valid but probably not intended."""
    notes = []
    parts = config.micro_batches * (devices if config.batch_norm == "per_device" else 1)
    if config.batch_size == parts and (layers := _layers_on_one_pixel(model, image_shape)):
        notes.append(
            f"in {len(layers)} layers, from {layers[0]} on, batch norm in training sees one pixel at a time, "
            "whose variance is 0: the result does not depend on the image. Choose a larger batch_size."
        )
    rounds = config.model.variant != "plain" and config.allocation.until > 0
    if rounds and not config.allocation.reset_momentum and _keeps_parameters(optimizer):
        notes.append(
            f"{config.optimizer.name} remembers what parameters were, even after re-allocation has rewritten "
            "them. With allocation.reset_momentum=true it forgets those."
        )
    rate = config.optimizer.learning_rate
    if rate != 1 and finds_its_rate(config.optimizer.name):
        notes.append(
            f"{config.optimizer.name} finds the learning rate itself, and optimizer.learning_rate, which is "
            f"{rate}, multiplies it. With optimizer.learning_rate=1.0 it is used as found."
        )
    return tuple(notes)


def _layers_on_one_pixel(model: nn.Module, image_shape: tuple[int, ...]) -> list[str]:
    """List the layers with batch norm that read a single pixel of each image."""
    found = []

    def look(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        result, module = call(*args, **kwargs), context.module
        if module.has_variable("batch_stats", "mean") and args and args[0].shape[:-1] == (1, 1, 1):
            found.append("/".join(module.path))
        return result

    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    with nn.intercept_methods(look):
        jax.eval_shape(lambda image: model.init(jax.random.key(0), image, train=False), image)
    return found


def _keeps_parameters(optimizer: optax.GradientTransformation) -> bool:
    """Return whether the optimizer's state depends on the initial values of the parameters."""
    params = {"kernel": jnp.ones((1, 1, 2, 2)), "scale": jnp.ones(2), "shift": jnp.ones((2, 2))}
    states = [optimizer.init(jax.tree.map(lambda leaf: leaf * factor, params)) for factor in (1, 2)]  # noqa: B023
    pairs = zip(*map(jax.tree.leaves, states), strict=True)
    return any(jnp.issubdtype(a.dtype, jnp.floating) and not np.array_equal(a, b) for a, b in pairs)


@contextlib.contextmanager
def _refused(message: str) -> Iterator[None]:
    """Turn any exception into a `ConfigError` of one line, with its text in place of ``{}``."""
    try:
        yield
    except SelconvError:
        raise
    except Exception as error:  # optax, flax and jax raise nearly any exception
        reason = str(error).partition("\n")[0].rstrip(". ")
        raise ConfigError(message.format(reason or type(error).__name__)) from error


def _types(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
