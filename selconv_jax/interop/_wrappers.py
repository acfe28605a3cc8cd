"""Finds the arrays of a network in what training programs save around them."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

from selconv_jax.errors import CheckpointError
from selconv_jax.interop._arrays import to_numpy

__all__ = ["Found", "find_network"]

Path = tuple[str, ...]

# What torch.nn.DataParallel, torch.compile, FSDP and activation checkpoints put between the names of modules.
_INNER = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


@dataclasses.dataclass(frozen=True)
class Found:
    """The arrays of a network, taken out of their wrappers.

    Attributes:
        arrays: By the names that were looked for, as many as there are.
        others: Names of what lies beside them and was not looked for.
    """

    arrays: Mapping[str, Any]
    others: tuple[str, ...]


def find_network(content: Mapping[Any, Any], names: Collection[str], needed: Collection[str]) -> Found:
    """Take the arrays of a network out of dictionaries and prefixes, in any order and nesting.

    All wrappers are prefixes here: a dictionary below the key ``model`` puts ``model.`` before its names,
    as a Lightning module puts it before those of its attribute. The network is where most of its names
    follow a prefix. Wrappers of single modules within the names (`torch.compile`, `torch.nn.DataParallel`,
    ...) are left out.

    Args:
        content: A state dict, or what holds one.
        names: What the arrays may be called.
        needed: Those without which the network is not whole.

    Returns:
        What was found; everything is among ``others`` where no name is known.

    Raises:
        CheckpointError: There are two whole networks, or two arrays of one name, that differ.

    Example:
        >>> saved = {"net": {"module.conv.weight": 1, "module.conv.extra": 2}, "epoch": 3}
        >>> find_network(saved, {"conv.weight"}, {"conv.weight"})
        Found(arrays={'conv.weight': 1}, others=('conv.extra',))
    """
    flat = dict(_flatten(content, ()))
    by_prefix: dict[Path, dict[str, Path]] = {}
    for path in flat:
        for start, part in enumerate(path):
            name = _plain(path[start:])
            if part not in _INNER and name in names:
                first = by_prefix.setdefault(path[:start], {}).setdefault(name, path)
                _require_equal(flat, first, path)
    if not by_prefix:
        return Found({}, tuple(".".join(path) for path in flat))
    prefix, found = max(by_prefix.items(), key=lambda item: len(item[1].keys() & set(needed)))
    for other in by_prefix.values():
        if other.keys() >= set(needed):
            for name in needed:
                _require_equal(flat, found[name], other[name])
    beside = (_plain(path[len(prefix) :]) for path in flat if path[: len(prefix)] == prefix)
    arrays = {name: flat[path] for name, path in found.items()}
    return Found(arrays, tuple(name for name in beside if name not in arrays))


def _flatten(content: Mapping[Any, Any], above: Path) -> Iterator[tuple[Path, Any]]:
    """Every value below dictionaries, by the parts of its name that dots and dictionaries separate."""
    for key, value in content.items():
        path = (*above, *str(key).split("."))
        if isinstance(value, Mapping):
            yield from _flatten(value, path)
        else:
            yield path, value


def _plain(path: Path) -> str:
    return ".".join(part for part in path if part not in _INNER)


def _require_equal(flat: Mapping[Path, Any], first: Path, second: Path) -> None:
    if first != second and not np.array_equal(to_numpy(flat[first]), to_numpy(flat[second])):
        raise CheckpointError(
            f"holds different weights as {'.'.join(first)} and as {'.'.join(second)}: load the file, and "
            "pass the dictionary that is meant."
        )
