"""Values that the CPU compiler must compute once and store, not recompute in each operation reading them."""

from typing import TypeVar

from jax import lax

from selconv_jax._xla.platforms import target_platform

T = TypeVar("T")


def materialize(x: T) -> T:
    """Return the same value, on CPU forced into memory; so are its derivatives, forward and backward.

    The CPU compiler fuses cheap operations into every operation that reads them. Without a
    barrier, each residual block would recompute the sum of all blocks before it, and the gradient of a chain
    of concatenations likewise: quadratic in depth. The compilers of other platforms do not need one.

    Args:
        x: Any array, or a pytree of arrays.

    Example:
        >>> import jax.numpy as jnp
        >>> materialize(jnp.arange(3.0)).tolist()
        [0.0, 1.0, 2.0]
    """
    return lax.optimization_barrier(x) if target_platform() == "cpu" else x
