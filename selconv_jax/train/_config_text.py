"""Configuration values as users type them, and hints on the correct spelling."""

import re
import tomllib
from typing import Any

from selconv_jax.errors import ConfigError

# TOML takes neither .5 nor 5. nor 007.
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")

_REMEDIES = {
    "Expected `int": "Write a whole number without dot and exponent, such as 10.",
    "Expected `float": "Write a number, such as 0.001 or 1e-3.",
    "Expected `bool": "Write true or false.",
    "Expected `str": "Write the text in double quotes; in a shell, with single quotes around them.",
}


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Change a value of a configuration, as TOML gives it, in place by an override as `load_config` takes it.

    Example:
        >>> tree = {"epochs": 3}
        >>> apply_override(tree, "optimizer.learning_rate=.05")
        >>> tree
        {'epochs': 3, 'optimizer': {'learning_rate': 0.05}}
    """
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"override {override!r} is not of the form key=value, such as epochs=10.")
    for part in parts[:-1]:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"override {override!r}: {part!r} is a value, it has no keys.")
    if text.strip().lower() == "none":
        tree.pop(parts[-1], None)
        return
    tree[parts[-1]] = _value(text)


def _value(text: str) -> Any:
    word = text.strip()
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        if _NUMBER.fullmatch(word):
            return int(word) if word.lstrip("+-").isdecimal() else float(word)
        return word == "True" if word in ("True", "False") else text


def remedy(message: str) -> str:
    """Return a sentence on how to write a value of the type that an error message expects, or ""."""
    return next((f" {text}" for start, text in _REMEDIES.items() if start in message), "")


def hint(text: str, error: Exception) -> str:
    """Return a sentence on how to write the number at which the TOML parser fails in a file, or ""."""
    place = re.search(r"at line (\d+)", str(error))
    line = text.splitlines()[int(place[1]) - 1] if place else ""
    value = line.partition("=")[2].partition("#")[0].strip()
    return f" Write {value} with a digit on both sides of the dot." if _NUMBER.fullmatch(value) else ""
