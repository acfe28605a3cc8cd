"""Reading of Tiny-ImageNet from its original zip archive or the folder it was unpacked to.

It contains 200 classes of ImageNet, with 500 training and 50 validation images each, and test images
without labels, which are left out. Classes are indexed in the sorted order of their WordNet ids,
which is not the order of ``wnids.txt``.
"""

import contextlib
import functools
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from selconv_jax.data._catalog import KnownSet
from selconv_jax.data._preparation.image_files import ImageFile, ImageFiles
from selconv_jax.data._preparation.originals import read_file
from selconv_jax.errors import DataError

__all__ = ["open_tiny_imagenet"]

_FOLDER = "tiny-imagenet-200"
_CLASSES = "wnids.txt"
_VALIDATION = "val/val_annotations.txt"


@contextlib.contextmanager
def open_tiny_imagenet(known: KnownSet, source: Path) -> Iterator[ImageFiles]:
    """Find the files, without reading their content.

    Args:
        known: The catalog's entry.
        source: ``tiny-imagenet-200.zip``, the folder it was unpacked to, or one that holds either.

    Yields:
        The splits ``train`` and ``validation``.

    Raises:
        DataError: If the archive is damaged, or a list of classes or labels is missing or malformed.
    """
    with contextlib.ExitStack() as stack:
        tree = _open_tree(known, source, stack)
        wnids = tuple(sorted(tree.read(_CLASSES).decode(errors="replace").split()))
        yield ImageFiles(
            class_names=wnids,
            splits={
                "train": functools.partial(_train, tree, wnids),
                "validation": functools.partial(_validation, tree, wnids),
            },
        )


def _train(tree: "_Tree", wnids: tuple[str, ...]) -> Iterator[ImageFile]:
    for label, wnid in enumerate(wnids):
        for name in tree.images(f"train/{wnid}/images"):
            yield ImageFile(
                name.rpartition("/")[2], label, tree.describe(name), functools.partial(tree.read, name)
            )


def _validation(tree: "_Tree", wnids: tuple[str, ...]) -> Iterator[ImageFile]:
    labels = {wnid: label for label, wnid in enumerate(wnids)}
    for number, line in enumerate(tree.read(_VALIDATION).decode(errors="replace").splitlines(), start=1):
        file, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if wnid not in labels:
            raise DataError(
                f"{tree.describe(_VALIDATION)}, line {number}: {line!r} is not a file name and one of the "
                f"classes of {_CLASSES}, separated by a tab. Get the archive again."
            )
        name = f"val/images/{file}"
        yield ImageFile(file, labels[wnid], tree.describe(name), functools.partial(tree.read, name))


class _Tree(Protocol):
    """Files of the set, packed or unpacked."""

    def describe(self, name: str) -> str:
        """Describe the location of a file, for messages."""

    def read(self, name: str) -> bytes:
        """Read a file."""

    def images(self, folder: str) -> list[str]:
        """List the JPEG files in a folder, sorted."""


class _Folder:
    def __init__(self, root: Path) -> None:
        self._root = root

    def describe(self, name: str) -> str:
        return str(self._root / name)

    def read(self, name: str) -> bytes:
        return read_file(self._root / name)

    def images(self, folder: str) -> list[str]:
        return sorted(f"{folder}/{path.name}" for path in (self._root / folder).glob("*.JPEG"))


class _Zip:
    def __init__(self, path: Path, archive: zipfile.ZipFile, prefix: str) -> None:
        self._path, self._archive, self._prefix = path, archive, prefix
        self._images: dict[str, list[str]] = {}
        for member in sorted(archive.namelist()):
            name = member.removeprefix(prefix)
            if name.endswith(".JPEG"):
                self._images.setdefault(name.rpartition("/")[0], []).append(name)

    def describe(self, name: str) -> str:
        return f"{self._path}, {self._prefix}{name}"

    def read(self, name: str) -> bytes:
        try:
            return self._archive.read(self._prefix + name)
        except KeyError:
            raise DataError(f"{self.describe(name)}: the file is missing. Get the archive again.") from None
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError) as error:
            raise DataError(f"{self.describe(name)}: damaged ({error}). Get the archive again.") from error

    def images(self, folder: str) -> list[str]:
        return self._images.get(folder, [])


def _open_tree(known: KnownSet, source: Path, stack: contextlib.ExitStack) -> _Tree:
    """Open the files in an archive, a folder, or an archive in a folder."""
    if source.is_dir():
        for folder in (source, source / _FOLDER):
            if (folder / _CLASSES).is_file():
                return _Folder(folder)
        packed = source / f"{_FOLDER}.zip"
        if not packed.is_file():
            raise DataError(
                f"{source}: there is neither {packed.name} nor {_CLASSES} in it. Get it from {known.origin}."
            )
        source = packed
    try:
        archive = stack.enter_context(zipfile.ZipFile(source))
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(
            f"{source}: damaged, cut short, or not a zip archive ({error}). Get it from {known.origin}."
        ) from error
    member = next((name for name in archive.namelist() if name.rpartition("/")[2] == _CLASSES), None)
    if member is None:
        raise DataError(f"{source}: there is no {_CLASSES} in it. Get it from {known.origin}.")
    return _Zip(source, archive, member.removesuffix(_CLASSES))
