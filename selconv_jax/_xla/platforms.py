"""Target platform of tracing, for formulations that differ in speed but not in result."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax
from jax.sharding import AxisType

_target: contextvars.ContextVar[str | None] = contextvars.ContextVar("target_platform", default=None)


def target_platform() -> str:
    """Return the platform traced for, ``"cpu"``, ``"gpu"`` or ``"tpu"``: JAX's default or of `tracing_for`.

    While they are traced, functions choose among formulations of the same mathematics by it. A program
    that runs on another platform than it was traced for is correct, but slower.
    """
    return _target.get() or jax.default_backend()


@contextlib.contextmanager
def tracing_for(platform: str) -> Iterator[None]:
    """Trace for another platform than the default one, for ahead-of-time compilation.

    Functions that are already traced are not traced again: pass `jax.jit` a new function inside the context.

    Args:
        platform: ``"cpu"``, ``"gpu"`` or ``"tpu"``.

    Example:
        >>> with tracing_for("tpu"):
        ...     target_platform()
        'tpu'
    """
    token = _target.set(platform)
    try:
        yield
    finally:
        _target.reset(token)


def joins_axes(x: jax.Array) -> bool:
    """Check whether to flatten axes of ``x``: on CPU, unless they belong to an explicit mesh."""
    explicit = any(kind == AxisType.Explicit for kind in jax.typeof(x).sharding.mesh.axis_types)
    return target_platform() == "cpu" and not explicit
