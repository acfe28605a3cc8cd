"""Keys of a configuration: each must be a field of its section; suggestions for those that are not."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

from selconv_jax.errors import ConfigError, nearest
from selconv_jax.models import MODELS


def check_keys(tree: Mapping[str, Any], config: Any) -> None:
    """Raise a `ConfigError` unless every key of a nested mapping is one of the dataclass ``config``.

    Keys of ``model.options`` and ``optimizer.options`` are checked where they are used.
    """
    _check_keys(tree, config, (), config)


def _check_keys(tree: Mapping[str, Any], kind: Any, path: tuple[str, ...], config: Any) -> None:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key, value in tree.items():
        if key not in fields:
            suggestion = _nearest_key(key, path, fields, config)
            raise ConfigError(f"unknown configuration key {'.'.join((*path, key))!r}. {suggestion}")
        if dataclasses.is_dataclass(fields[key].type) and isinstance(value, Mapping):
            _check_keys(value, fields[key].type, (*path, key), config)


def _nearest_key(key: str, path: tuple[str, ...], fields: Mapping[str, Any], config: Any) -> str:
    """Suggest a key of the same section, or the section a known key belongs to."""
    for section in dataclasses.fields(config):
        if dataclasses.is_dataclass(section.type) and section.name not in path:
            names = [field.name for field in dataclasses.fields(section.type)]
            if key in names:
                return f"Did you mean '{section.name}.{key}'?"
    options = (inspect.signature(network).parameters for network, _ in MODELS.values())
    if key not in ("parent", "num_classes") and any(key in names for names in options):
        return f"Did you mean 'model.options.{key}'?"
    return nearest(key, fields)
