"""The platform a program is traced for, where formulations differ in speed but not in result."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

__all__ = ["target_platform", "tracing_for"]

_target: contextvars.ContextVar[str | None] = contextvars.ContextVar("target_platform", default=None)


def target_platform() -> str:
    """``"cpu"``, ``"gpu"`` or ``"tpu"``: what `tracing_for` says, else JAX's default backend.

    Functions choose among formulations of the same mathematics by it, while they are traced. A program
    that runs elsewhere than it was traced for is right, and slower.
    """
    return _target.get() or jax.default_backend()


@contextlib.contextmanager
def tracing_for(platform: str) -> Iterator[None]:
    """Trace for another platform than the default one, for ahead-of-time compilation.

    What is already traced stays so: give `jax.jit` a function of its own inside of the context.

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
