"""Checks of the numbers that users give."""

import operator
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from selconv_jax.errors import ConfigError

__all__ = ["check_number", "check_whole", "is_whole"]


def is_whole(value: Any) -> bool:
    """Whether a value is an integer, of Python, NumPy or JAX; true and false are none, nor is 2.0.

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

    Args:
        name: What the user calls the value.
        value: Anything.
        least: The smallest value that is allowed.
        requirement: What it must be, in the message; else it is said by ``least``.

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
    """Raise a `ConfigError` unless a value is a number, or an array of one, within its bounds.

    Of a traced number only the shape can be checked.

    Args:
        name: What the user calls the value.
        value: Anything.
        is_valid: Tells whether a number is within its bounds.
        requirement: What it must be, in the message.

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


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str) else str(value)
