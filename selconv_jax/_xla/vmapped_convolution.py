"""A batching rule for convolutions: under `jax.vmap` over networks, a dense one for each of them."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

__all__ = ["convolutions_are_unrolled", "unrolled_bilinear", "unrolled_convolutions"]

Array = jax.Array

_unrolled: contextvars.ContextVar[bool] = contextvars.ContextVar("unrolled_convolutions", default=False)


def convolutions_are_unrolled() -> bool:
    """Tell whether what is traced goes under a `jax.vmap` over networks, see `unrolled_convolutions`."""
    return _unrolled.get()


@contextlib.contextmanager
def unrolled_convolutions() -> Iterator[None]:
    """Trace convolutions for a `jax.vmap` over networks: every member makes a dense one of its own.

    JAX itself makes one grouped convolution of them, which takes an array with the members next to the
    channels, and many times as long. Everything else is batched as usual. Traced so, a network has no
    derivative in forward mode. As with `platforms.tracing_for`, what is traced already stays so.

    Example:
        >>> with unrolled_convolutions():
        ...     convolutions_are_unrolled()
        True
    """
    token = _unrolled.set(True)
    try:
        yield
    finally:
        _unrolled.reset(token)


def unrolled_bilinear(function: Callable[[Array, Array], Array], x: Array, y: Array) -> Array:
    """Call a bilinear function, which `jax.vmap`, also of its gradient, calls once for every member.

    Args:
        function: Linear in each argument.
        x: Its first argument.
        y: Its second argument.

    Returns:
        ``function(x, y)``.
    """

    @jax.custom_vjp
    def call(x: Array, y: Array) -> Array:
        return _each(function)(x, y)

    def forward(x: Array, y: Array) -> tuple[Array, tuple[Array, Array]]:
        return call(x, y), (x, y)

    def backward(kept: tuple[Array, Array], change: Array) -> tuple[Array, Array]:
        x, y = kept
        like_x, like_y = jax.typeof(x), jax.typeof(y)

        def of_x(change: Array, y: Array) -> Array:
            (result,) = jax.linear_transpose(lambda x: function(x, y), like_x)(change)
            return result

        def of_y(change: Array, x: Array) -> Array:
            (result,) = jax.linear_transpose(lambda y: function(x, y), like_y)(change)
            return result

        return _each(of_x)(change, y), _each(of_y)(change, x)

    call.defvjp(forward, backward)
    return call(x, y)


def _each(function: Callable[..., Array]) -> Callable[..., Array]:
    """The function; under `jax.vmap` it is called once for every member."""
    call: Any = custom_vmap(function)

    def of_members(size: int, batched: list[bool], *arguments: Array) -> tuple[Array, bool]:
        results = [
            function(*(each[member] if many else each for each, many in zip(arguments, batched, strict=True)))
            for member in range(size)
        ]
        return jnp.stack(results), True

    call.def_vmap(of_members)
    return call
