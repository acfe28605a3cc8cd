"""Capacities of selective layers that fit the copies they have."""

import math
import types
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from selconv_jax._utils.arguments import check_whole
from selconv_jax.errors import ConfigError
from selconv_jax.nn._interception import call_in_place, replaced_calls, sow_of_wrapper
from selconv_jax.nn._layers import SelectiveConv
from selconv_jax.transforms._layer_tree import layer_states


def required_capacity(variables: Any) -> float:
    """Return the smallest sufficient ``capacity``: the largest fraction of copies in any selective layer.

    Args:
        variables: The model's variables, holding concrete arrays; or an NNX module.

    Returns:
        A fraction in [0, 1], see `SelectiveConv`.

    Raises:
        ConfigError: The sources are traced, or shapes.
        ValueError: See `with_capacity`.

    Example:
        >>> import jax, jax.numpy as jnp, selconv_jax
        >>> layer = selconv_jax.SelectiveConv(features=2, kernel_size=(1, 1))
        >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 4, 4, 8)), train=False)
        >>> selconv_jax.required_capacity(variables)
        0.0
    """
    return max((_fraction(source) for source in _sources(variables).values()), default=0.0)


class FittedCapacity(nn.Module):
    """Network each of whose selective layers has a capacity of its own; `with_capacity` creates it.

    Attributes:
        model: The network.
        capacities: Path and capacity of each selective layer.
    """

    model: nn.Module
    capacities: tuple[tuple[str, float], ...]

    sow = sow_of_wrapper

    def setup(self) -> None:
        """Share the network's scope, so that this wrapper does not appear in the names of variables."""
        nn.share_scope(self, self.model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network."""
        return self._run("__call__", *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Return a method of the network, for ``apply(..., method=name)``."""
        if not callable(getattr(type(vars(self).get("model")), name, None)):
            return super().__getattr__(name)

        def method(self: FittedCapacity, *args: Any, **kwargs: Any) -> Any:
            if self.scope is None:
                return getattr(self.model, name)(*args, **kwargs)
            return self._run(name, *args, **kwargs)

        return types.MethodType(method, self)

    def _run(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the network with the capacities of its layers."""
        capacities = dict(self.capacities)

        def swap(module: Any, path: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if not isinstance(module, SelectiveConv):
                return call(*args, **kwargs)
            capacity = capacities.get(path, module.capacity)
            if capacity == module.capacity:
                return call(*args, **kwargs)
            fitted = module.clone(capacity=capacity, parent=module.scope)
            return call_in_place(module, fitted, *args, **kwargs)

        with replaced_calls(self, swap, first=True):
            return getattr(self.model, method)(*args, **kwargs)


def with_capacity(model: nn.Module, variables: Any, steps: int = 8) -> FittedCapacity:
    """Return a network that provides for just the copies that its layers have, after any round.

    A layer costs as much as its ``capacity`` provides for, by default copies of all of its channels. Call
    this after each round of your own loop and compile the training step with the result: with nothing copied
    the step costs what that of the plain network costs.

    Args:
        model: The network, or what this function has returned before.
        variables: Its variables, holding concrete arrays.
        steps: Capacities are rounded up to multiples of ``1 / steps``, so that not every round compiles anew.

    Returns:
        The same network, with the same results. Networks with the same capacities compare equal, so that
        they can serve as static arguments of a compiled step.

    Raises:
        ConfigError: The sources are traced, or shapes.
        ValueError: There is no selective layer, or its arrays are inconsistent.

    Example:
        >>> import jax, jax.numpy as jnp, selconv_jax
        >>> layer = selconv_jax.SelectiveConv(features=4, kernel_size=(3, 3))
        >>> x = jnp.ones((1, 8, 8, 16))
        >>> variables = layer.init(jax.random.key(0), x, train=False)
        >>> variables, report = selconv_jax.reallocate(
        ...     variables, jax.random.key(1), selconv_jax.AllocationRule(threshold=0.1))
        >>> report.copies, selconv_jax.with_capacity(layer, variables).capacities
        (2, (('', 0.125),))
    """
    while isinstance(model, FittedCapacity):
        model = model.model
    return FittedCapacity(model, tuple(sorted(fitted_capacities(variables, steps).items())))


def fitted_capacities(variables: Any, steps: int) -> dict[str, float]:
    """Return the smallest sufficient capacity of each selective layer, in multiples of ``1 / steps``."""
    check_whole("steps", steps, 1)
    return {
        name: math.ceil(steps * _fraction(source)) / steps for name, source in _sources(variables).items()
    }


def _sources(variables: Any) -> dict[str, np.ndarray]:
    """Return the sources of the selective layers that are not gate-only, by path."""
    sources = {name: state.source for name, state in layer_states(variables).items()}
    if any(isinstance(source, jax.core.Tracer | jax.ShapeDtypeStruct) for source in sources.values()):
        raise ConfigError(
            "the sources are traced or shapes, but their values decide what is compiled. Call this outside "
            "of jax.jit, with arrays."
        )
    return {name: source for name, source in jax.device_get(sources).items() if source is not None}


def _fraction(source: Any) -> float:
    """Return the fraction of copies; in a stack of layers, the largest."""
    return float((source >= 0).mean(axis=-1).max())
