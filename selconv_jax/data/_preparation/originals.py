"""Original files of a data set, and their verification."""

import contextlib
import dataclasses
import hashlib
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from selconv_jax.data._catalog import KnownSet
from selconv_jax.data._dataset import ImageData, Split
from selconv_jax.errors import DataError

__all__ = ["Part", "archive_damage", "check_counts", "read_file", "verify"]


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
    """Read a file; raise a `DataError` if that fails."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from error


@contextlib.contextmanager
def archive_damage(where: Path | str) -> Iterator[None]:
    """Turn the errors of a damaged tar archive inside the block to a `DataError` that names the archive."""
    try:
        yield
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        reason = str(error).partition("\n")[0].rstrip(":")
        raise DataError(
            f"{where}: damaged, cut short, or not an archive ({reason}). Get it again."
        ) from error


def verify(known: KnownSet, parts: Mapping[str, Part], splits: Mapping[str, Split]) -> None:
    """Check the content of a set in memory against the catalog: checksums, shapes, labels and counts."""
    for name, digest in known.digests.items():
        found = hashlib.sha256(parts[name].content).hexdigest()
        if found != digest:
            raise DataError(
                f"{parts[name].path}: damaged, or not {name} of {known.name} (SHA-256 of its "
                f"content {found}, published {digest}). Get it again from {known.origin}."
            )
    ImageData(known.info(), splits["train"], splits["test"])  # shapes and labels
    for key, split in splits.items():
        check_counts(known, key, np.bincount(split.labels, minlength=known.num_classes))


def check_counts(known: KnownSet, key: str, per_class: NDArray[np.int64]) -> None:
    """Check the number of images of a split, in total and, for a balanced set, of each class."""
    total, least, most = per_class.sum(), per_class.min(), per_class.max()
    if total != known.counts[key] or (known.balanced and least != most):
        raise DataError(
            f"{known.name}, {key} split: {total} images, {least} to {most} per class; expected "
            f"{known.counts[key]}{', the same number of each class' if known.balanced else ''}. "
            f"Get it again from {known.origin}."
        )
