"""A network whose layers are replaced by smaller ones, without a change of its code or its names."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import flax.linen as nn
from flax.linen.dtypes import promote_dtype

from selconv_jax.compaction._layout import LayerLayout
from selconv_jax.compaction._static_layer import call_static
from selconv_jax.models._parts import Stem
from selconv_jax.nn._layers import PlainConv, SelectiveConv

__all__ = ["Compact", "intercept_calls", "is_layer", "is_producer", "relative_path"]


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
        """Gives the network's variables their own names, without a part for this wrapper."""
        nn.share_scope(self, self.network)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the network, see there."""
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
    return type(module) in (PlainConv, SelectiveConv)


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
