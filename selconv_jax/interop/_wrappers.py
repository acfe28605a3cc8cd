"""Search for a network's arrays inside the wrappers that training programs save."""

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

from selconv_jax.errors import CheckpointError
from selconv_jax.interop._arrays import to_numpy

Path = tuple[str, ...]

# Inserted between the names of modules by DataParallel, torch.compile, FSDP and activation checkpointing.
_INNER = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


@dataclasses.dataclass(frozen=True)
class Found:
    """The arrays of a network by the requested names, as far as they exist, and the names beside them."""

    arrays: Mapping[str, Any]
    others: tuple[str, ...]


def find_network(content: Mapping[Any, Any], names: Collection[str], needed: Collection[str]) -> Found:
    """Extract the arrays of a network from dictionaries and prefixes in any order and nesting.

    All wrappers are treated as prefixes: a dictionary under the key ``model`` prefixes its names with
    ``model.``, as a Lightning module does with those of its attribute. The prefix with most of the needed
    names is taken. Wrappers of single modules inside names (`torch.compile`, `torch.nn.DataParallel`, ...)
    are skipped.

    A complete network has all ``needed`` of the possible ``names``. If none is known, all are in ``others``.

    Raises:
        CheckpointError: There are two complete networks, or two arrays of one name, that differ.

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


def shapes_in(content: Mapping[Any, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all arrays in nested dictionaries, by their names with prefixes."""
    return {_plain(path): tuple(getattr(value, "shape", ())) for path, value in _flatten(content, ())}


def _flatten(content: Mapping[Any, Any], above: Path) -> Iterator[tuple[Path, Any]]:
    """Iterate over the leaves of nested dictionaries, with paths split at keys and dots."""
    for key, value in content.items():
        # torchvision's files have names of before PyTorch forbade dots in those of modules: "norm.1".
        name = re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\b", r"\1\2", str(key))
        path = (*above, *name.split("."))
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
            "pass the dictionary to use."
        )
