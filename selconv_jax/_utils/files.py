"""Atomic writing of files, and reading of archives of arrays."""

import json
import os
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from selconv_jax.errors import CheckpointError


def write_atomically(path: Path, content: str | bytes | Callable[[BinaryIO], object]) -> None:
    """Write text (as UTF-8), bytes, or what a function writes to the open file, by renaming a temporary file.

    After a failure the old file is intact, and no temporary file is left.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        with beside.open("wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # else a crash after the rename could leave an empty file
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, document: Any) -> None:
    """Write a document as indented JSON, see `write_atomically`."""
    write_atomically(path, json.dumps(document, indent=1) + "\n")


def check_target(path: Path, *, overwrite: bool = False) -> None:
    """Raise a `CheckpointError` if the file already exists, is a folder, or its folder does not exist."""
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder. Choose the name of a file.")
    if path.exists() and not overwrite:
        raise CheckpointError(f"{path}: there is a file already. Choose another name or remove it first.")
    check_folder(path.parent)
    if not path.parent.is_dir():
        raise CheckpointError(f"{path}: there is no folder {path.parent}; make it first.")


def check_folder(path: Path) -> None:
    """Raise a `CheckpointError` if a folder cannot be made, as it or one above it is a file."""
    for each in (path, *path.parents):
        if each.exists() and not each.is_dir():
            raise CheckpointError(f"{each} is a file, not a folder. Choose another name, or remove it first.")


def read_npz(path: Path) -> dict[str, NDArray[Any]]:
    """Read all arrays of an npz file; raise a `ValueError` if it is not a whole one of plain arrays."""
    try:
        with path.open("rb") as stream:  # of a damaged file, NumPy would leave its own open
            archive = np.load(stream, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("it holds one array without a name")
            with archive:
                return dict(archive)
    except (OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(str(error)) from error
