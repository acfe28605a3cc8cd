"""Original files of a data set, and their verification."""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from selconv_jax.data._catalog import KnownSet
from selconv_jax.data._dataset import ImageData, Split
from selconv_jax.errors import DataError

__all__ = ["Part", "read_file", "verify"]


@dataclasses.dataclass(frozen=True)
class Part:
    """One original file, unpacked, from whichever package or archive it came.

    Attributes:
        content: Its bytes.
        path: Its location, for messages: a file, or an archive and a member of it.
    """

    content: bytes
    path: str


def read_file(path: Path) -> bytes:
    """Read a file.

    Args:
        path: The file.

    Returns:
        Its content.

    Raises:
        DataError: If it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from error


def verify(known: KnownSet, parts: Mapping[str, Part], splits: Mapping[str, Split]) -> None:
    """Check the content of a set against the catalog.

    Args:
        known: The catalog's entry.
        parts: The original files by name.
        splits: The splits decoded from them, ``train`` and ``test``.

    Raises:
        DataError: If a file's checksum, the number of images, in total or per class, their shape or the
            range of the labels is not the published one. The message names the file or the split.
    """
    for name, digest in known.digests.items():
        found = hashlib.sha256(parts[name].content).hexdigest()
        if found != digest:
            raise DataError(
                f"{parts[name].path}: damaged, or not {name} of {known.name} (SHA-256 of its "
                f"content {found}, published {digest}). Get it again from {known.origin}."
            )
    ImageData(known.info(), splits["train"], splits["test"])  # shapes and labels
    for key, split in splits.items():
        per_class = np.bincount(split.labels, minlength=known.num_classes)
        if len(split) != known.counts[key] or per_class.min() != per_class.max():
            raise DataError(
                f"{known.name}, {key} split: {len(split)} images, per class {per_class.tolist()}; "
                f"expected {known.counts[key]}, the same number of each class. "
                f"Get it again from {known.origin}."
            )
