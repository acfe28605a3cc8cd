"""What of a run's configuration its result follows from, and what may differ from one command to the next."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from flax import traverse_util

from selconv_jax.errors import CheckpointError, ConfigError
from selconv_jax.train._config import Config, override_config

__all__ = ["check_origin", "origin_of", "with_changes"]

# The results do not depend on these but for rounding.
_FREE = (
    "description",
    "eval_batch_size",
    "checkpoint_minutes",
    "keep_checkpoints",
    "steps_per_dispatch",
    "devices",
    "parameter_shards",
    "data.directory",
    "data.workers",
)
_SHOWN = 5


def with_changes(config: Config, overrides: Sequence[str]) -> Config:
    """The configuration of a run that is resumed or read elsewhere.

    Args:
        config: That of the run's directory.
        overrides: ``"key=value"``, of keys that do not change the result.

    Returns:
        The configuration with those values.

    Raises:
        ConfigError: A key or value is wrong, or the result would follow from it.
    """
    changed = override_config(config, overrides)
    keys = _differences(_flat(origin_of(config)), _flat(origin_of(changed)))
    if keys:
        free = ", ".join(key for key in _FREE if key in _free(config))
        raise ConfigError(
            f"{keys[0]} cannot be changed: the run would no longer be the same one. What can be is {free}. "
            "Start another run by `selconv train`."
        )
    return changed


def origin_of(config: Config) -> dict[str, Any]:
    """What the result of a run follows from, as JSON has it.

    Example:
        >>> origin = origin_of(Config(seed=3, devices=2))
        >>> origin["seed"], "devices" in origin
        (3, False)
    """
    flat = {
        key: value for key, value in _flat(dataclasses.asdict(config)).items() if key not in _free(config)
    }
    return traverse_util.unflatten_dict(flat, sep=".")


def check_origin(folder: object, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Sees that a checkpoint is of the configuration at hand.

    Args:
        folder: Of the checkpoint.
        saved: Its `origin_of`; empty if it is not known.
        current: That of the configuration.

    Raises:
        CheckpointError: They differ; the message names the keys and the values.
    """
    if not saved or not current:
        return
    before, now = _flat(saved), _flat(current)
    keys = _differences(before, now)
    if keys:
        parts = [
            f"{key} was {_shown(before.get(key))} and is {_shown(now.get(key))}" for key in keys[:_SHOWN]
        ]
        more = f"; and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
        raise CheckpointError(
            f"the configuration has been changed since {folder} was saved: {'; '.join(parts)}{more}. Put the "
            "old values back, or train anew in another --workdir."
        )


def _free(config: Config) -> set[str]:
    """The keys of `_FREE`, without those that matter to this run."""
    return {key for key in _FREE if config.batch_norm == "global" or key != "devices"}


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    return traverse_util.flatten_dict(dict(tree), sep=".")


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Keys of different values; one that is missing, as versions differ, has its default."""
    defaults = _flat(dataclasses.asdict(Config()))
    keys = list(dict.fromkeys([*now, *before]))
    return [key for key in keys if before.get(key, defaults.get(key)) != now.get(key, defaults.get(key))]


def _shown(value: Any) -> str:
    return "not set" if value is None else repr(value)
