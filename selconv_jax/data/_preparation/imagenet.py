"""Reading of ImageNet (ILSVRC2012) from its original archives or folders of images.

The training archive contains one archive per class, named by its WordNet id. The validation archive
contains images without labels, ``ILSVRC2012_val_00000001.JPEG`` and so on; their published labels are
part of tensorflow-datasets, so that the development kit is not needed. Classes are indexed in the
sorted order of their WordNet ids.
"""

import contextlib
import dataclasses
import functools
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from selconv_jax.data._catalog import KnownSet
from selconv_jax.data._preparation.originals import ImageFile, ImageFiles, archive_damage, read_file
from selconv_jax.errors import DataError

_PLACES = {"train": ("ILSVRC2012_img_train.tar", "train"), "validation": ("ILSVRC2012_img_val.tar", "val")}


@contextlib.contextmanager
def open_imagenet(known: KnownSet, source: Path) -> Iterator[ImageFiles]:
    """Find the files, without reading their content.

    Args:
        known: The catalog's entry.
        source: A folder that holds, for each split, its archive or its folder: ``train/CLASS/*.JPEG``,
            and ``val/CLASS/*.JPEG`` or ``val/*.JPEG``; or one of the archives, the other beside it.

    Yields:
        The splits ``train`` and ``validation``.
    """
    from tensorflow_datasets.core import tfds_path

    lists = tfds_path("datasets/imagenet2012")
    wnids = tuple((lists / "labels.txt").read_text().split())
    classes = {wnid: label for label, wnid in enumerate(wnids)}
    published = [classes[wnid] for wnid in (lists / "validation_labels.txt").read_text().split()]
    folder = source.parent if source.is_file() else source
    splits = {}
    for split, (archive, images) in _PLACES.items():
        labels = _Labels(classes, published if split == "validation" else [])
        if (folder / archive).is_file():
            splits[split] = functools.partial(_archive, folder / archive, labels)
        elif (folder / images).is_dir():
            splits[split] = functools.partial(_folder, folder / images, labels)
        else:
            raise DataError(
                f"{folder}: there is neither {archive} nor a folder {images}. Get them from {known.origin}."
            )
    yield ImageFiles(wnids, splits)


@dataclasses.dataclass(frozen=True)
class _Labels:
    """Labels by WordNet id, and those published for the files of a split, by their number."""

    classes: Mapping[str, int]
    published: Sequence[int]

    def of_class(self, wnid: str, where: str) -> int:
        if wnid not in self.classes:
            raise DataError(
                f"{where}: {wnid!r} is none of the 1,000 classes of ILSVRC2012 (WordNet ids such as "
                "n01440764)."
            )
        return self.classes[wnid]

    def of_file(self, name: str, where: str) -> int:
        """Return the published label of a file such as ``ILSVRC2012_val_00000001.JPEG``."""
        number = name.removeprefix("ILSVRC2012_val_").removesuffix(".JPEG")
        if not (number.isdecimal() and 1 <= int(number) <= len(self.published)):
            raise DataError(
                f"{where}: the label of this file is not known. Put the files into one folder per class, or "
                "use the original ILSVRC2012_val_*.JPEG."
            )
        return self.published[int(number) - 1]


def _folder(folder: Path, labels: _Labels) -> Iterator[ImageFile]:
    """Iterate over images in one folder per class, or, if their labels are published, in a single one."""
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            label = labels.of_class(entry.name, str(entry))
            for path in sorted(entry.glob("*.JPEG")):
                yield ImageFile(path.name, label, str(path), functools.partial(read_file, path))
        elif entry.suffix == ".JPEG":
            label = labels.of_file(entry.name, str(entry))
            yield ImageFile(entry.name, label, str(entry), functools.partial(read_file, entry))


def _archive(path: Path, labels: _Labels) -> Iterator[ImageFile]:
    """Iterate over images in one inner archive per class, or, if their labels are published, beside them."""
    with archive_damage(path), tarfile.open(path) as outer:
        for member in filter(tarfile.TarInfo.isfile, outer):
            name, where = Path(member.name), f"{path}, {member.name}"
            if name.suffix != ".tar":
                yield _member(outer, member, where, labels.of_file(name.name, where))
                continue
            label = labels.of_class(name.stem, where)
            with archive_damage(where), tarfile.open(fileobj=outer.extractfile(member)) as inner:
                for image in filter(tarfile.TarInfo.isfile, inner):
                    yield _member(inner, image, f"{where}, {image.name}", label)


def _member(archive: tarfile.TarFile, member: tarfile.TarInfo, where: str, label: int) -> ImageFile:
    def read() -> bytes:
        with archive_damage(where):
            stream = archive.extractfile(member)
            assert stream is not None  # it is a file
            return stream.read()

    return ImageFile(Path(member.name).name, label, where, read)
