"""Reading of ImageNet (ILSVRC2012) from its original archives or folders of images.

The training archive contains one archive per class, named by its WordNet id. The validation archive
contains images without labels, ``ILSVRC2012_val_00000001.JPEG`` and so on; their published labels are
part of tensorflow-datasets, so that the development kit is not needed. Classes are indexed in the
sorted order of their WordNet ids.
"""

import contextlib
import functools
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from selconv_jax.data._catalog import KnownSet
from selconv_jax.data._preparation.image_files import ImageFile, ImageFiles
from selconv_jax.data._preparation.originals import read_file
from selconv_jax.errors import DataError

__all__ = ["open_imagenet"]

_ARCHIVES = {"train": "ILSVRC2012_img_train.tar", "validation": "ILSVRC2012_img_val.tar"}
_FOLDERS = {"train": "train", "validation": "val"}


@contextlib.contextmanager
def open_imagenet(known: KnownSet, source: Path) -> Iterator[ImageFiles]:
    """Find the files, without reading their content.

    Args:
        known: The catalog's entry.
        source: A folder that holds, for each split, its archive or its folder: ``train/CLASS/*.JPEG``,
            and ``val/CLASS/*.JPEG`` or ``val/*.JPEG``; or one of the archives, the other beside it.

    Yields:
        The splits ``train`` and ``validation``.

    Raises:
        DataError: If a split is missing; while files are read, if an archive is damaged or a class unknown.
    """
    from tensorflow_datasets.core import tfds_path

    lists = tfds_path("datasets/imagenet2012")
    wnids = tuple((lists / "labels.txt").read_text().split())
    labels = {wnid: label for label, wnid in enumerate(wnids)}
    validation = [labels[wnid] for wnid in (lists / "validation_labels.txt").read_text().split()]
    folder = source.parent if source.is_file() else source
    splits = {}
    for split, archive in _ARCHIVES.items():
        images = folder / _FOLDERS[split]
        published = validation if split == "validation" else []
        if (folder / archive).is_file():
            read: Callable[..., Iterator[ImageFile]] = _train_archive if split == "train" else _flat_archive
            splits[split] = functools.partial(read, folder / archive, labels, published)
        elif images.is_dir():
            splits[split] = functools.partial(_folder, images, labels, published)
        else:
            raise DataError(
                f"{folder}: there is neither {archive} nor a folder {images.name}. "
                f"Get them from {known.origin}."
            )
    yield ImageFiles(wnids, splits)


def _folder(folder: Path, labels: Mapping[str, int], published: list[int]) -> Iterator[ImageFile]:
    """Iterate over images in one folder per class, or, if their labels are published, in a single one."""
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            label = _class(entry.name, str(entry), labels)
            for path in sorted(entry.glob("*.JPEG")):
                yield ImageFile(path.name, label, str(path), functools.partial(read_file, path))
        elif entry.suffix == ".JPEG":
            label = _published(entry.name, str(entry), published)
            yield ImageFile(entry.name, label, str(entry), functools.partial(read_file, entry))


def _train_archive(path: Path, labels: Mapping[str, int], published: list[int]) -> Iterator[ImageFile]:
    """Iterate over images in an archive of archives."""
    del published
    with _damage_named(path), tarfile.open(path) as outer:
        for member in outer:
            stream = outer.extractfile(member)
            if stream is None:
                continue
            where = f"{path}, {member.name}"
            label = _class(Path(member.name).stem, where, labels)
            with _damage_named(where), tarfile.open(fileobj=stream) as inner:
                yield from _members(inner, where, functools.partial(_same, label))


def _flat_archive(path: Path, labels: Mapping[str, int], published: list[int]) -> Iterator[ImageFile]:
    """Iterate over images in one archive, with published labels."""
    del labels
    with _damage_named(path), tarfile.open(path) as archive:
        yield from _members(archive, str(path), lambda name: _published(name, f"{path}, {name}", published))


def _members(archive: tarfile.TarFile, where: str, label_of: Callable[[str], int]) -> Iterator[ImageFile]:
    for member in archive:
        if member.isfile():
            name = Path(member.name).name
            path = f"{where}, {member.name}"
            yield ImageFile(name, label_of(name), path, functools.partial(_read, archive, member, path))


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> bytes:
    with _damage_named(path):
        stream = archive.extractfile(member)
        assert stream is not None  # it is a file
        return stream.read()


def _same(label: int, name: str) -> int:
    """Return the label of a class."""
    del name
    return label


def _class(wnid: str, where: str, labels: Mapping[str, int]) -> int:
    if wnid not in labels:
        raise DataError(
            f"{where}: {wnid!r} is none of the 1,000 classes of ILSVRC2012 (WordNet ids such as n01440764)."
        )
    return labels[wnid]


def _published(name: str, where: str, published: list[int]) -> int:
    """Return the published label of a file such as ``ILSVRC2012_val_00000001.JPEG``."""
    number = name.removeprefix("ILSVRC2012_val_").removesuffix(".JPEG")
    if not (number.isdecimal() and 1 <= int(number) <= len(published)):
        raise DataError(
            f"{where}: the label of this file is not known. Put the files into one folder per class, or use "
            "the original ILSVRC2012_val_*.JPEG."
        )
    return published[int(number) - 1]


@contextlib.contextmanager
def _damage_named(where: Path | str) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, OSError, EOFError) as error:
        reason = str(error).partition("\n")[0].rstrip(":")
        raise DataError(
            f"{where}: damaged, cut short, or not an archive ({reason}). Get it again."
        ) from error
