"""Checks of numbers given by the user."""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from selconv_jax.errors import ConfigError


def is_whole(value: Any) -> bool:
    """Check whether a value is an integer of Python, NumPy or JAX; booleans and 2.0 are not.

    Example:
        >>> import numpy as np
        >>> [is_whole(value) for value in (3, np.int64(3), 3.0, True, "3")]
        [True, True, False, False, False]
    """
    try:
        operator.index(value)
    except TypeError:
        return False
    return not isinstance(value, bool)


def check_whole(name: str, value: Any, least: int, requirement: str = "") -> None:
    """Raise a `ConfigError` unless a value is a whole number of at least ``least``.

    Example:
        >>> check_whole("every", 1.5, 1)
        Traceback (most recent call last):
        ...
        selconv_jax.errors.ConfigError: every is 1.5; it must be a whole number, at least 1.
    """
    if not is_whole(value) or value < least:
        raise ConfigError(
            f"{name} is {_shown(value)}; it must be {requirement or f'a whole number, at least {least}'}."
        )


def check_number(name: str, value: Any, is_valid: Callable[[Any], Any], requirement: str) -> None:
    """Raise a `ConfigError` unless a value is a number, or a scalar array, for which ``is_valid`` is true.

    Only the shape of a traced number can be checked. ``requirement`` completes "it must be".

    Example:
        >>> check_number("share", "half", lambda share: 0 <= share <= 1, "in [0, 1]")
        Traceback (most recent call last):
        ...
        selconv_jax.errors.ConfigError: share is 'half'; it must be in [0, 1].
    """
    try:
        valid = np.shape(value) == () and (isinstance(value, jax.core.Tracer) or bool(is_valid(value)))
    except TypeError:
        valid = False
    if not valid:
        raise ConfigError(f"{name} is {_shown(value)}; it must be {requirement}.")


def check_dtype(name: str, array: Any, kind: Any, requirement: str) -> None:
    """Raise a ValueError unless the dtype of an array is of a kind, such as ``np.floating``.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> check_dtype("gate", jnp.ones(4, jnp.int8), np.bool_, "bool")
        Traceback (most recent call last):
        ...
        ValueError: gate has dtype int8; it must be bool.
    """
    if not jnp.issubdtype(array.dtype, kind):
        raise ValueError(f"{name} has dtype {array.dtype}; it must be {requirement}.")


def check_shape(name: str, array: Any, shape: tuple[int, ...], requirement: str) -> None:
    """Raise a ValueError unless an array has a shape: else it would be broadcast, or cut off, in silence.

    Example:
        >>> import jax.numpy as jnp
        >>> check_shape("scores", jnp.ones(1), (4,), "[C], as gate is")
        Traceback (most recent call last):
        ...
        ValueError: scores has shape (1,); it must be (4,): [C], as gate is.
    """
    if array.shape != shape:
        raise ValueError(f"{name} has shape {tuple(array.shape)}; it must be {shape}: {requirement}.")


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str) else str(value)
