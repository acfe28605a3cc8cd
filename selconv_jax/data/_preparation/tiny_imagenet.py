"""Reading of Tiny-ImageNet from its original zip archive or the folder it was unpacked to.

It contains 200 classes of ImageNet, with 500 training and 50 validation images each, and test images
without labels, which are left out. Classes are indexed in the sorted order of their WordNet ids,
which is not the order of ``wnids.txt``.
"""

import contextlib
import dataclasses
import functools
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from selconv_jax.data._catalog import KnownSet
from selconv_jax.data._preparation.originals import ImageFile, ImageFiles, read_file
from selconv_jax.errors import DataError

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


@dataclasses.dataclass(frozen=True)
class _Tree:
    """Files of the set, packed or unpacked.

    Attributes:
        location: Prefix of a file's name in messages.
        names: All names, such as ``train/n01443537/images/n01443537_0.JPEG``.
        read: Reads a file.
    """

    location: str
    names: Sequence[str]
    read: Callable[[str], bytes]

    def image(self, name: str, label: int) -> ImageFile:
        """Describe an image file."""
        read = functools.partial(self.read, name)
        return ImageFile(name.rpartition("/")[2], label, self.location + name, read)

    @functools.cached_property
    def images(self) -> Mapping[str, Sequence[str]]:
        """Names of the JPEG files by folder, sorted."""
        images: dict[str, list[str]] = {}
        for name in sorted(self.names):
            if name.endswith(".JPEG"):
                images.setdefault(name.rpartition("/")[0], []).append(name)
        return images


def _train(tree: _Tree, wnids: Sequence[str]) -> Iterator[ImageFile]:
    for label, wnid in enumerate(wnids):
        for name in tree.images.get(f"train/{wnid}/images", ()):
            yield tree.image(name, label)


def _validation(tree: _Tree, wnids: Sequence[str]) -> Iterator[ImageFile]:
    labels = {wnid: label for label, wnid in enumerate(wnids)}
    for number, line in enumerate(tree.read(_VALIDATION).decode(errors="replace").splitlines(), start=1):
        file, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if wnid not in labels:
            raise DataError(
                f"{tree.location}{_VALIDATION}, line {number}: {line!r} is not a file name and one of the "
                f"classes of {_CLASSES}, separated by a tab. Get the archive again."
            )
        yield tree.image(f"val/images/{file}", labels[wnid])


def _open_tree(known: KnownSet, source: Path, stack: contextlib.ExitStack) -> _Tree:
    """Open the files in an archive, a folder, or an archive in a folder."""
    if source.is_dir():
        root = next((path for path in (source, source / _FOLDER) if (path / _CLASSES).is_file()), None)
        if root is not None:
            names = [path.relative_to(root).as_posix() for path in root.glob("train/*/images/*")]
            return _Tree(f"{root}/", names, lambda name: read_file(root / name))
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
    prefix = member.removesuffix(_CLASSES)

    def read(name: str) -> bytes:
        try:
            return archive.read(prefix + name)
        except KeyError:
            problem = "the file is missing"
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError) as error:
            problem = f"damaged ({error})"
        raise DataError(f"{source}, {prefix}{name}: {problem}. Get the archive again.")

    return _Tree(f"{source}, {prefix}", [name.removeprefix(prefix) for name in archive.namelist()], read)
