"""How a network is called: its inputs, and the modes it can run in."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from flax.core.scope import DenyList

from selconv_jax.compaction._module import Compact
from selconv_jax.errors import ConfigError

__all__ = ["NetworkCall", "network_call"]


@dataclasses.dataclass(frozen=True)
class NetworkCall:
    """The calls ``apply(variables, *inputs, train=...)`` of a network.

    Attributes:
        inputs: Shapes of the inputs.
        modes: The values that ``train`` takes: ``(False, True)``; ``(None,)`` if there is no such argument.
        may_lack_train: There is ``**kwargs`` instead of it, which may not take it.
    """

    inputs: tuple[Any, ...]
    modes: tuple[bool | None, ...]
    may_lack_train: bool = False

    def run(self, model: Compact, variables: Any, inputs: tuple[Any, ...], train: bool | None) -> Any:
        """What the network returns; in training with the collections that it may change.

        Args:
            model: The network, whole or smaller.
            variables: Its variables.
            inputs: The inputs.
            train: One of ``modes``.

        Returns:
            The output, and collections by name; none but in training.
        """
        apply: Callable[..., Any] = model.apply
        key = jax.random.key(0)
        if not train:
            flag = {} if train is None else {"train": False}
            return apply(variables, *inputs, rngs={"params": key}, **flag), {}
        rngs = {"params": key, "dropout": key}
        return apply(variables, *inputs, train=True, mutable=DenyList(("intermediates",)), rngs=rngs)


def network_call(model: nn.Module, example: Any, method: Any) -> tuple[NetworkCall, str | None]:
    """Finds out how a network is to be called.

    Args:
        model: The network.
        example: An input, or a tuple of several, or their shapes.
        method: The method, or its name; None: ``__call__``.

    Returns:
        The call and the name of the method.

    Raises:
        ConfigError: There is no such method, or the example is no array.
    """
    name = method if isinstance(method, str) or method is None else getattr(method, "__name__", None)
    function = getattr(model, name or "__call__", None) if name or method is None else None
    if not callable(function):
        raise ConfigError(f"method is {method!r}; a {type(model).__name__} has no such method.")
    inputs = example if isinstance(example, tuple) else (example,)
    try:
        shapes = jax.eval_shape(lambda *inputs: inputs, *inputs)
    except TypeError as error:
        raise ConfigError(
            f"example is a {type(example).__name__} that holds more than arrays; pass an input, such "
            "as jnp.ones((1, 32, 32, 3)), or a tuple of several."
        ) from error
    arguments = inspect.signature(function).parameters
    has_train = "train" in arguments
    is_open = any(argument.kind is inspect.Parameter.VAR_KEYWORD for argument in arguments.values())
    modes = (False, True) if has_train or is_open else (None,)
    return NetworkCall(shapes, modes, is_open and not has_train), None if name == "__call__" else name
