"""The network that is compacted: how it is called, how its layers are intercepted."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import flax.linen as nn
import jax
from flax.core.scope import DenyList
from flax.linen.dtypes import promote_dtype

from selconv_jax.compaction._layout import LayerLayout
from selconv_jax.compaction._static_conv import call_static
from selconv_jax.errors import ConfigError
from selconv_jax.models._parts import Stem
from selconv_jax.nn._layers import BatchNormReLUConv, SelectiveConv

__all__ = [
    "Compact",
    "NetworkCall",
    "example_inputs",
    "intercept_calls",
    "is_layer",
    "is_producer",
    "network_call",
    "relative_path",
]


class Compact(nn.Module):
    """A network that runs with fewer channels; `selconv_jax.compact` makes it with its variables.

    It is called like the network itself: ``apply(variables, x, train=...)``. The variables have the names
    that they have there; a layer in ``layouts`` has those of `static_layer.StaticConv`, a convolution in
    ``widths`` fewer outputs, a layer without outputs none at all. All else is as it was.

    Attributes:
        network: The network as it was, which holds no variables.
        layouts: Path and layout of each layer that is replaced.
        widths: Path and number of outputs of each other convolution that makes fewer.
        method: The network's method that is called; None: ``__call__``.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from selconv_jax import SelectiveConv
        >>> layout = LayerLayout(inputs=6, own=(0, 1, 4), copied=(), outputs=8)
        >>> model = Compact(SelectiveConv(8, (3, 3)), layouts=(("", layout),))
        >>> variables = model.init(jax.random.key(0), jnp.ones((1, 5, 5, 6)), train=False)
        >>> variables["params"]["kernel"].shape, sorted(variables)
        ((3, 3, 3, 8), ['batch_stats', 'params'])
    """

    network: nn.Module
    layouts: tuple[tuple[str, LayerLayout], ...] = ()
    widths: tuple[tuple[str, int], ...] = ()
    method: str | None = None

    def setup(self) -> None:
        """Give the network's variables their own names, without a part for this wrapper."""
        nn.share_scope(self, self.network)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network, see there."""
        layouts, widths = dict(self.layouts), dict(self.widths)
        root = tuple(filter(None, relative_path(self, ()).split("/")))

        def swap(module: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            path = relative_path(module, root)
            if is_layer(module) and (layout := layouts.get(path)):
                return call_static(module, layout, *args, **kwargs)
            width = widths.get(path) if is_producer(module) else None
            if width is not None and width != module.features:
                smaller = module.clone(features=width, parent=module.scope)
                return smaller(*args, **kwargs)
            return call(*args, **kwargs)

        with intercept_calls(swap):
            return getattr(self.network, self.method or "__call__")(*args, **kwargs)

    @property
    def dtype(self) -> Any:
        """Type of the computation, where the network has one; else None."""
        return getattr(self.network, "dtype", None)


def intercept_calls(handle: Callable[..., Any]) -> AbstractContextManager[None]:
    """Hands every call of a module inside of the context over.

    Args:
        handle: Called as ``handle(module, call, *args, **kwargs)`` where ``call(*args, **kwargs)`` was to be;
            returns what the call is to return.
    """

    def interceptor(
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        return handle(context.module, call, *args, **kwargs)

    return nn.intercept_methods(interceptor)


def is_layer(module: Any) -> bool:
    """Whether a module is a layer that may be replaced; a user's own kind of layer is left as it is."""
    return type(module) in (BatchNormReLUConv, SelectiveConv)


def is_producer(module: Any) -> bool:
    """Whether a module's outputs alone may be removed: another convolution, without groups.

    Convolutions with a function of the user's, or a mask, in them may compute one output from the weights of
    another.
    """
    if type(module) is not nn.Conv:
        return type(module) is Stem
    own = (module.mask, module.conv_general_dilated, module.conv_general_dilated_cls)
    is_usual = module.promote_dtype is promote_dtype and all(value is None for value in own)
    return is_usual and module.feature_group_count == 1


def relative_path(module: nn.Module, root: tuple[str, ...]) -> str:
    """The path of a module's variables below those at ``root``, parts joined by ``/``.

    A module's own path, and that of its scope, may go through modules that share the scope of others, such
    as `Compact`; the scopes above it do not.
    """
    scope: Any = module.scope
    parts: list[str] = []
    while scope.parent is not None:
        parts.insert(0, scope.name)
        scope = scope.parent
    return "/".join((*scope.path, *parts)[len(root) :])


@dataclasses.dataclass(frozen=True)
class NetworkCall:
    """The calls ``apply(variables, *inputs, train=..., **options)`` of a network.

    Attributes:
        inputs: Shapes of the inputs.
        modes: The values that ``train`` takes: ``(False, True)``; ``(None,)`` if there is no such argument.
        may_lack_train: There is ``**kwargs`` instead of it, which may not take it.
        options: Further arguments by name, the same in every call.
    """

    inputs: tuple[Any, ...]
    modes: tuple[bool | None, ...]
    may_lack_train: bool = False
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

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
        apply: Callable[..., Any] = functools.partial(model.apply, **self.options)
        key = jax.random.key(0)
        if not train:
            flag = {} if train is None else {"train": False}
            return apply(variables, *inputs, rngs={"params": key}, **flag), {}
        rngs = {"params": key, "dropout": key}
        return apply(variables, *inputs, train=True, mutable=DenyList(("intermediates",)), rngs=rngs)


def network_call(
    model: nn.Module, inputs: tuple[Any, ...], method: Any, options: Mapping[str, Any]
) -> tuple[NetworkCall, str | None]:
    """Find out how a network is to be called.

    Args:
        model: The network.
        inputs: What it is called with, or the shapes.
        method: The method, or its name; None: ``__call__``.
        options: Further arguments by name.

    Returns:
        The call and the name of the method.

    Raises:
        ConfigError: There is no such method, or an input is no array.
    """
    name = method if isinstance(method, str) or method is None else getattr(method, "__name__", None)
    function = getattr(model, name or "__call__", None) if name or method is None else None
    if not callable(function):
        raise ConfigError(f"method is {method!r}; a {type(model).__name__} has no such method.")
    try:
        shapes = jax.eval_shape(lambda *inputs: inputs, *inputs)
    except TypeError as error:
        raise ConfigError(
            f"the inputs ({', '.join(type(value).__name__ for value in inputs)}) hold more than arrays; pass "
            "arrays, such as jnp.ones((1, 32, 32, 3)), and all else by name."
        ) from error
    arguments = inspect.signature(function).parameters
    fixed = dict(options)
    has_train = "train" in arguments
    is_open = any(argument.kind is inspect.Parameter.VAR_KEYWORD for argument in arguments.values())
    modes: tuple[bool | None, ...] = (False, True) if has_train or is_open else (None,)
    if "train" in fixed:
        modes, is_open = (bool(fixed.pop("train")),), False
    call = NetworkCall(shapes, modes, is_open and not has_train, fixed)
    return call, None if name == "__call__" else name


def example_inputs(model: nn.Module, variables: Mapping[str, Any]) -> tuple[Any, ...]:
    """The inputs of a network that knows them itself, as those of `selconv_jax.models` do.

    Args:
        model: The network.
        variables: Its variables.

    Raises:
        ConfigError: It does not.
    """
    if hasattr(model, "example_images"):
        return (model.example_images(variables),)
    raise ConfigError(
        f"a {type(model).__name__} does not say what it is called with; pass its inputs, such as "
        "jnp.ones((1, 32, 32, 3)), or their shapes as jax.ShapeDtypeStruct."
    )
