"""Configuration keys that determine a run's result, and those that may change when it is resumed."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import tomli_w
from flax import traverse_util

from selconv_jax.errors import CheckpointError, ConfigError
from selconv_jax.train._config import Config, override_config

# Results do not depend on these keys, except for rounding.
_FREE = (
    "description",
    "eval_batch_size",
    "checkpoint_minutes",
    "keep_checkpoints",
    "steps_per_dispatch",
    "devices",
    "parameter_shards",
    "tracker",
    "data.directory",
    "data.workers",
)
_SHOWN = 5


def with_changes(config: Config, overrides: Sequence[str]) -> Config:
    """Apply overrides of keys that do not change the result to the configuration of an existing run."""
    changed = override_config(config, overrides)
    keys = _differences(_flat(origin_of(config)), _flat(origin_of(changed)))
    if keys:
        free = ", ".join(key for key in _FREE if key in _free(config))
        raise ConfigError(
            f"{keys[0]} cannot be changed: it determines the result of the run. Keys that can be changed: "
            f"{free}. Start another run by `selconv train`."
        )
    return changed


def free_overrides(config: Config) -> list[str]:
    """List the keys that do not change the result of a run, with their values, as overrides."""
    flat = _flat(dataclasses.asdict(config))
    return [
        f"{key}=none"
        if flat[key] is None
        else key + tomli_w.dumps({"": flat[key]}).strip().removeprefix('""')
        for key in _FREE
        if key in _free(config)
    ]


def origin_of(config: Config) -> dict[str, Any]:
    """Return the part of a configuration that determines the result of a run, as JSON values."""
    flat, free = _flat(dataclasses.asdict(config)), _free(config)
    return traverse_util.unflatten_dict({key: flat[key] for key in flat if key not in free}, sep=".")


def check_origin(folder: object, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Check that a checkpoint was saved with the `origin_of` the current configuration; empty: not known."""
    before, now = _flat(saved), _flat(current)
    keys = _differences(before, now) if before and now else []
    if keys:
        parts = [
            f"{key} was {_shown(before.get(key))} and is {_shown(now.get(key))}" for key in keys[:_SHOWN]
        ]
        more = f"; and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
        raise CheckpointError(
            f"the configuration has been changed since {folder} was saved: {'; '.join(parts)}{more}. Put the "
            "old values back, or train from scratch in another --workdir."
        )


def _free(config: Config) -> set[str]:
    """Select the keys of `_FREE` that do not affect the result of this run."""
    return {key for key in _FREE if config.batch_norm == "global" or key != "devices"}


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    return traverse_util.flatten_dict(dict(tree), sep=".")


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """List the keys whose values differ; a key missing in another version has its default."""
    defaults = _flat(dataclasses.asdict(Config()))
    keys = list(dict.fromkeys([*now, *before]))
    return [key for key in keys if before.get(key, defaults.get(key)) != now.get(key, defaults.get(key))]


def _shown(value: Any) -> str:
    return "not set" if value is None else repr(value)
