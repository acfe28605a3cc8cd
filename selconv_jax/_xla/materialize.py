"""Values that the CPU compiler shall compute once and store, instead of anew in each of their readers."""

from typing import TypeVar

from jax import lax

from selconv_jax._xla.platforms import target_platform

__all__ = ["materialize"]

T = TypeVar("T")


def materialize(x: T) -> T:
    """The same value, on CPU kept in memory; its derivatives likewise, forward and back.

    There the compiler fuses cheap operations into each of their readers. A sum along a chain of residual
    blocks, or the gradient along a chain of concatenations, would so be computed anew by every block from all
    terms before it: quadratic in the depth. Other platforms' compilers decide better by themselves.

    Args:
        x: Any array, or a pytree of arrays.

    Example:
        >>> import jax.numpy as jnp
        >>> materialize(jnp.arange(3.0)).tolist()
        [0.0, 1.0, 2.0]
    """
    return lax.optimization_barrier(x) if target_platform() == "cpu" else x
