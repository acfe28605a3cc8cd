"""The catalog of data sets: which are known by name, and which are on this machine."""

import dataclasses
import json
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from selconv_jax.data._catalog_entries import ENTRIES, SAMPLE, Download, KnownSet
from selconv_jax.errors import DataError, nearest

__all__ = [
    "KNOWN",
    "SAMPLE",
    "Download",
    "KnownSet",
    "Status",
    "default_data_dir",
    "find_known",
    "known_set",
    "prepare_command",
    "prepared_directories",
    "resolve_data_dir",
    "status",
]

KNOWN: dict[str, KnownSet] = {known.name: known for known in ENTRIES}


def known_set(name: str) -> KnownSet:
    """The catalog's entry of that name.

    Args:
        name: For example ``cifar10``.

    Returns:
        The entry.

    Raises:
        DataError: If the catalog has no such entry; the message suggests the nearest.
    """
    if name not in KNOWN:
        raise DataError(f"There is no data set {name!r} to prepare. {nearest(name, KNOWN)}")
    return KNOWN[name]


def find_known(name: str) -> KnownSet | None:
    """The catalog's entry for a set's name, with or without a config and a version.

    Args:
        name: ``name`` or ``name/config``, either followed by ``:version``.

    Returns:
        The entry; None: the set is none of the catalog.

    Example:
        >>> find_known("cifar10:3.0.2").image_shape
        (32, 32, 3)
    """
    return KNOWN.get(re.split("[/:]", name)[0])


def default_data_dir() -> Path:
    """Where tensorflow-datasets keeps prepared sets, unless told otherwise.

    Returns:
        The environment's ``TFDS_DATA_DIR``, else ``~/tensorflow_datasets``.
    """
    return Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def resolve_data_dir(data_dir: str | os.PathLike[str] | None) -> Path:
    """The given directory with ``~`` expanded, or the default one for ``None``."""
    return default_data_dir() if data_dir is None else Path(data_dir).expanduser()


def prepare_command(name: str, data_dir: Path) -> str:
    """The command line that prepares a set from files at hand.

    Args:
        name: The set.
        data_dir: Where it is to be prepared; named in the command if it is not the default.

    Returns:
        The command, with ``PATH`` for the files.

    Example:
        >>> prepare_command("cifar10", Path("sets"))
        'selconv data prepare cifar10 --from PATH --data-dir sets'
    """
    where = "" if data_dir == default_data_dir() else f" --data-dir {shlex.quote(str(data_dir))}"
    return f"selconv data prepare {name} --from PATH{where}"


def prepared_directories(data_dir: Path) -> dict[str, Path]:
    """The prepared tensorflow-datasets under a directory, found without that library.

    Args:
        data_dir: The directory; it need not exist.

    Returns:
        The directory of the newest version by ``name`` or ``name/config``.
    """
    found: dict[str, Path] = {}
    for file in sorted(
        [*data_dir.glob("*/*/dataset_info.json"), *data_dir.glob("*/*/*/dataset_info.json")],
        key=lambda file: _version(file.parent.name),
    ):
        folder = file.parent
        name = folder.parent.relative_to(data_dir)
        complete = (folder / "features.json").is_file() and _version(folder.name)
        if complete and not name.parts[0].startswith("."):
            found[name.as_posix()] = folder
    return found


def _version(text: str) -> tuple[int, ...]:
    """``(3, 0, 1)`` for ``"3.0.1"``, and ``()`` for what is not a version."""
    parts = text.split(".")
    return tuple(map(int, parts)) if len(parts) == 3 and all(map(str.isdecimal, parts)) else ()


@dataclasses.dataclass(frozen=True)
class Status:
    """One row of ``selconv data list``.

    Attributes:
        name: The name to load it by.
        state: Whether it can be loaded now.
        counts: Number of images by split; empty if unknown.
        image_shape: ``(height, width, channels)``, or ``None`` if unknown.
        num_classes: Number of classes, or ``None`` if unknown.
        path: The prepared directory, or ``None``.
        origin: Where its files can be had.
    """

    name: str
    state: Literal["included", "prepared", "not prepared"]
    counts: Mapping[str, int]
    image_shape: tuple[int, int, int] | None
    num_classes: int | None
    path: Path | None
    origin: str


def status(data_dir: str | os.PathLike[str] | None = None) -> list[Status]:
    """What can be loaded: the sets of the catalog, then others prepared in the directory.

    Args:
        data_dir: The directory of the prepared sets; by default that of tensorflow-datasets.

    Returns:
        One row per data set.

    Example:
        >>> status("/nowhere")[0].state
        'included'
    """
    prepared = prepared_directories(resolve_data_dir(data_dir))
    rows = []
    for known in KNOWN.values():
        path = prepared.pop(known.name, None)
        rows.append(
            Status(
                name=known.name,
                state="included" if known.name == SAMPLE else "prepared" if path else "not prepared",
                counts=known.counts,
                image_shape=known.image_shape,
                num_classes=known.num_classes,
                path=path,
                origin=known.origin,
            )
        )
    for name, path in sorted(prepared.items()):
        rows.append(Status(name, "prepared", _counts(path), None, None, path, "tensorflow-datasets"))
    return rows


def _counts(folder: Path) -> dict[str, int]:
    """Number of examples by split, from the description beside a prepared set."""
    try:
        splits = json.loads((folder / "dataset_info.json").read_text())["splits"]
        return {split["name"]: sum(map(int, split["shardLengths"])) for split in splits}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
