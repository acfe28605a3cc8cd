"""Batching rule for convolutions under `jax.vmap` over networks: one dense convolution per network."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from selconv_jax._xla.kernel_gradient import Bilinear

Array = jax.Array

_unrolled: contextvars.ContextVar[bool] = contextvars.ContextVar("unrolled_convolutions", default=False)


def convolutions_are_unrolled() -> bool:
    """Return whether convolutions are traced for a `jax.vmap` over networks, see `unrolled_convolutions`."""
    return _unrolled.get()


@contextlib.contextmanager
def unrolled_convolutions() -> Iterator[None]:
    """Trace convolutions for a `jax.vmap` over networks, with one dense convolution per network.

    JAX would batch them to one grouped convolution, which needs the networks' axis next to the channels
    and takes many times as long. All other operations are batched as usual. A network traced this way has no
    forward-mode derivative. As with `tracing_for`, functions that are already traced are not traced again.

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


def unrolled_bilinear(function: Bilinear, x: Array, y: Array, function_of_y: Bilinear | None = None) -> Array:
    """Call a bilinear function; `jax.vmap` of it or its gradient calls it once per member of the batch.

    Args:
        function: Linear in each argument.
        x: Its first argument.
        y: Its second argument.
        function_of_y: The same function in another formulation, from which the gradient by ``y`` is made.

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
            (result,) = jax.linear_transpose(lambda y: (function_of_y or function)(x, y), like_y)(change)
            return result

        return _each(of_x)(change, y), _each(of_y)(change, x)

    call.defvjp(forward, backward)
    return call(x, y)


def _each(function: Callable[..., Array]) -> Callable[..., Array]:
    """Wrap a function so that `jax.vmap` calls it once per member of the batch."""
    call: Any = custom_vmap(function)

    def of_members(size: int, batched: list[bool], *arguments: Array) -> tuple[Array, bool]:
        results = [
            function(*(each[member] if many else each for each, many in zip(arguments, batched, strict=True)))
            for member in range(size)
        ]
        return jnp.stack(results), True

    call.def_vmap(of_members)
    return call
