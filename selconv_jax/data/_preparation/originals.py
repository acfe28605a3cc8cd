"""Original files of a data set, whole in memory or read one image at a time, and their verification."""

import contextlib
import dataclasses
import hashlib
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from selconv_jax._utils.console import Progress
from selconv_jax.data._catalog import KnownSet
from selconv_jax.data._dataset import ImageData, Split
from selconv_jax.errors import DataError

_REPORT_EVERY = 10_000


@dataclasses.dataclass(frozen=True)
class Part:
    """One original file, unpacked, and its location for messages: a file, or an archive and a member."""

    content: bytes
    path: str


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """One image file, whose content is read on demand.

    Attributes:
        name: Its name, unique within the split.
        label: Index of its class.
        path: Its location, for messages.
        read: Returns its content; valid until the next file is requested.
    """

    name: str
    label: int
    path: str
    read: Callable[[], bytes]


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """The files of a data set: a function per split that starts a pass over them; classes by label."""

    class_names: tuple[str, ...]
    splits: Mapping[str, Callable[[], Iterator[ImageFile]]]


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
        _check_counts(known, key, np.bincount(split.labels, minlength=known.num_classes))


def verify_files(known: KnownSet, files: ImageFiles, progress: Progress) -> None:
    """Check the number of classes and files against the catalog, without reading the files."""
    if len(files.class_names) != known.num_classes:
        raise DataError(
            f"{known.name}: {len(files.class_names)} classes; expected {known.num_classes}. "
            f"Get it again from {known.origin}."
        )
    for key, expected in known.counts.items():
        per_class = np.zeros(known.num_classes, np.int64)
        task = f"Counting {key} images of {known.name}"
        for number, file in enumerate(files.splits[key]()):
            per_class[file.label] += 1
            if number % _REPORT_EVERY == 0 and number < expected:
                progress(task, number, expected)
        _check_counts(known, key, per_class)
        progress(task, expected, expected)


def _check_counts(known: KnownSet, key: str, per_class: NDArray[np.int64]) -> None:
    """Check the number of images of a split, in total and, for a balanced set, of each class."""
    total, least, most = per_class.sum(), per_class.min(), per_class.max()
    if total != known.counts[key] or (known.balanced and least != most):
        raise DataError(
            f"{known.name}, {key} split: {total} images, {least} to {most} per class; expected "
            f"{known.counts[key]}{', the same number of each class' if known.balanced else ''}. "
            f"Get it again from {known.origin}."
        )
