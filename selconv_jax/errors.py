"""User-fixable errors, and helpers for their messages."""

import difflib
from collections.abc import Iterable

__all__ = ["CheckpointError", "ConfigError", "DataError", "SelconvError", "check_value", "nearest"]


class SelconvError(Exception):
    """A user-fixable error; its message names the key, path or value and the remedy.

    The command line prints such an error as one paragraph, without a traceback.
    """


class ConfigError(SelconvError, ValueError):
    """A configuration key or value is unknown or out of bounds."""


class DataError(SelconvError):
    """A data set is missing, not prepared, or a file of it is damaged."""


class CheckpointError(SelconvError):
    """A checkpoint is missing or damaged, belongs to another model, or could not be written."""


def nearest(name: str, options: Iterable[str]) -> str:
    """Suggest a valid name for a misspelled one.

    Args:
        name: The unknown name as the user wrote it.
        options: The names that would have been valid.

    Returns:
        A sentence: ``"Did you mean 'epochs'?"`` if an option is close, else a list of all of them.

    Example:
        >>> from selconv_jax.errors import nearest
        >>> nearest("epoch", ["epochs", "seed"])
        "Did you mean 'epochs'?"
    """
    choices = sorted(options)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    if close:
        return f"Did you mean {close[0]!r}?"
    return f"Valid: {', '.join(choices)}." if choices else "There are none to choose from."


def check_value(key: str, value: object, valid: bool, bounds: str) -> None:
    """Raise a `ConfigError` unless a value of the configuration is valid.

    Args:
        key: Its key, with dots between the parts.
        value: The value.
        valid: Whether it is valid.
        bounds: What it must be, completing "it must be".

    Raises:
        ConfigError: It is not valid.
    """
    if not valid:
        raise ConfigError(f"{key} is {value}; it must be {bounds}.")
