"""Interception of the calls of a network's modules."""

import contextlib
import contextvars
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
from flax.core import freeze

_Handler = Callable[..., Any]

# Those in their order, and those that come after all others.
_handlers: contextvars.ContextVar[tuple[tuple[_Handler, ...], tuple[_Handler, ...]]] = contextvars.ContextVar(
    "handlers", default=((), ())
)


@contextlib.contextmanager
def intercept_calls(handle: _Handler, first: bool = False, last: bool = False) -> Iterator[None]:
    """Intercept every call of a module inside the context.

    Of several contexts the outermost comes first, as with Flax's own interceptors.

    Args:
        handle: Called as ``handle(module, call, *args, **kwargs)`` in place of ``call(*args, **kwargs)``; its
            result becomes that of the call.
        first: This handler comes first nevertheless, so that the others see the layers with which a network
            has replaced its own.
        last: This handler comes last nevertheless, so that all others see the modules as they are.
    """
    outer, after = _handlers.get()
    is_first_context = not (outer or after)
    if last:
        after = (*after, handle)
    else:
        outer = (handle, *outer) if first else (*outer, handle)
    token = _handlers.set((outer, after))
    try:
        with nn.intercept_methods(_interceptor) if is_first_context else contextlib.nullcontext():
            yield
    finally:
        _handlers.reset(token)


def _interceptor(
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    context: nn.module.InterceptorContext,
) -> Any:
    if context.method_name == "__call__":
        outer, after = _handlers.get()
        for handle in reversed((*outer, *after)):
            call = functools.partial(handle, context.module, call)
    with own_programs(context.module):
        return call(*args, **kwargs)


@contextlib.contextmanager
def own_programs(module: nn.Module) -> Iterator[None]:
    """Have ``nn.jit`` trace anew all that the module calls inside the context.

    It keeps programs by the attributes of a module, so that one traced here would serve calls that are not
    intercepted, or a module of another path, and vice versa.
    """
    scope: Any = module.scope
    if scope is None:
        yield
        return
    flags = scope.flags
    scope.flags = freeze({**flags, "selconv_jax": _Unequal()})  # flags are compared too, and inherited
    try:
        yield
    finally:
        scope.flags = flags


@contextlib.contextmanager
def replaced_calls(wrapper: nn.Module, handle: _Handler, first: bool = False) -> Iterator[None]:
    """Intercept the calls of the network with which a module shares its scope, inside the context.

    Args:
        wrapper: The module.
        handle: Called as ``handle(module, path, call, *args, **kwargs)``, with the path of the variables of
            each module below those of the network.
        first: See `intercept_calls`.
    """
    root = scope_path(wrapper)

    def with_path(module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return handle(module, relative_path(module, root), call, *args, **kwargs)

    with intercept_calls(with_path, first=first), own_programs(wrapper):
        yield


# Under which Flax stores what a module returns (``capture_intermediates``).
_CAPTURED = ("intermediates", "__call__")


@nn.nowrap
def sow_of_wrapper(self: Any, col: str, name: str, value: Any, *args: Any, **kwargs: Any) -> bool:
    """Store a value as `nn.Module.sow` does, but not what the module's own call returned.

    The method ``sow`` of a network that calls another one, with which it shares its scope: where Flax
    captures what modules return, the other one stores it.
    """
    return (col, name) != _CAPTURED and nn.Module.sow(self, col, name, value, *args, **kwargs)


def call_in_place(replaced: nn.Module, module: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a new module in the place of another one, whose scope it has.

    Where Flax captures what modules return, it asks both; the result is stored once.
    """
    is_stored = False

    def sow_once(owner: nn.Module) -> Callable[..., bool]:
        def sow(col: str, name: str, *args: Any, **kwargs: Any) -> bool:
            nonlocal is_stored
            if (col, name) == _CAPTURED:
                if is_stored:
                    return False
                is_stored = True
            return type(owner).sow(owner, col, name, *args, **kwargs)

        return sow

    for owner in (replaced, module):
        object.__setattr__(owner, "sow", sow_once(owner))
    return module(*args, **kwargs)


class _Unequal:
    """Value that is never the same twice."""

    _hashes = itertools.count()

    def __hash__(self) -> int:
        return next(self._hashes)


def relative_path(module: nn.Module, root: tuple[str, ...]) -> str:
    """Return the path of a module's variables below ``root``, parts joined by ``/``."""
    return "/".join(scope_path(module)[len(root) :])


def scope_path(module: nn.Module) -> tuple[str, ...]:
    """Return the path of a module's variables.

    The module's own path cannot be used: it includes modules that share the scope of others, such as compact
    networks, which the scopes above it do not.
    """
    return path_of_scope(module.scope)


def path_of_scope(scope: Any) -> tuple[str, ...]:
    """Return the path of the variables in a scope."""
    parts: list[str] = []
    while scope.parent is not None:
        parts.insert(0, scope.name)
        scope = scope.parent
    return (*scope.path, *parts)
