"""Reading of CIFAR-100 from one of its original archives, packed or unpacked.

Both archives are converted to the form of the binary one, with one record per image: a byte with the
superclass ("coarse" label), one with the class ("fine" label), then the red, green and blue planes,
1,024 bytes each, row by row.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from selconv_jax.data._catalog import KnownSet
from selconv_jax.data._dataset import Split
from selconv_jax.data._preparation.cifar_files import read_batch, read_members
from selconv_jax.data._preparation.originals import Part
from selconv_jax.errors import DataError

__all__ = ["COARSE_CLASSES", "decode_cifar100", "read_cifar100"]

_COARSE = """
aquatic_mammals fish flowers food_containers fruit_and_vegetables household_electrical_devices
household_furniture insects large_carnivores large_man-made_outdoor_things
large_natural_outdoor_scenes large_omnivores_and_herbivores medium_mammals non-insect_invertebrates
people reptiles small_mammals trees vehicles_1 vehicles_2
"""
COARSE_CLASSES = tuple(_COARSE.split())

_SPLITS = ("train", "test")
_FOLDERS = (".", "cifar-100-binary", "cifar-100-python")
_PIXELS = 32 * 32
_RECORD = 2 + 3 * _PIXELS


def read_cifar100(known: KnownSet, source: Path) -> dict[str, Part]:
    """Read the two files.

    Args:
        known: The catalog's entry.
        source: An archive (``.tar.gz``), the folder it was unpacked to, or the folder that holds
            that folder.

    Returns:
        ``train`` and ``test`` in the form of the binary archive.

    Raises:
        DataError: If a file is missing, damaged, or of another form.
    """
    binary = {f"{split}.bin" for split in _SPLITS}
    files = read_members(source, {*_SPLITS, *binary}, _FOLDERS)
    if not files:
        raise DataError(
            f"{source}: neither an archive of CIFAR-100 nor the folder it was unpacked to. "
            f"Get it from {known.origin}."
        )
    ending = ".bin" if binary & set(files) else ""
    for split in _SPLITS:
        if split + ending not in files:
            raise DataError(f"{source}: {split}{ending} is missing. Get it from {known.origin}.")
    return {
        split: files[split + ending] if ending else _from_pickle(files[split + ending]) for split in _SPLITS
    }


def decode_cifar100(parts: Mapping[str, Part]) -> tuple[dict[str, Split], dict[str, NDArray[np.int32]]]:
    """Decode the two files to splits.

    Args:
        parts: The files in the form of the binary archive.

    Returns:
        ``train`` and ``test``, with images uint8 ``[N, 32, 32, 3]`` and labels (classes) int32 ``[N]``;
        and the superclasses by split, int32 ``[N]``.

    Raises:
        DataError: If a file does not consist of whole records, or a class belongs to several
            superclasses.
    """
    splits, coarse = {}, {}
    for split, part in parts.items():
        if not part.content or len(part.content) % _RECORD:
            raise DataError(
                f"{part.path}: {len(part.content)} bytes are not a whole number of records of "
                f"{_RECORD}; the file is damaged or cut short. Get it again."
            )
        records = np.frombuffer(part.content, np.uint8).reshape(-1, _RECORD)
        pairs = np.unique(records[:, :2], axis=0)
        if pairs[:, 0].max() >= len(COARSE_CLASSES) or len(np.unique(pairs[:, 1])) < len(pairs):
            raise DataError(
                f"{part.path}: its superclasses are not 0 to {len(COARSE_CLASSES) - 1}, one for each "
                "class; the file is damaged. Get it again."
            )
        planes = records[:, 2:].reshape(-1, 3, 32, 32)
        images = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
        splits[split] = Split(images, records[:, 1].astype(np.int32))
        coarse[split] = records[:, 0].astype(np.int32)
    return splits, coarse


def _from_pickle(part: Part) -> Part:
    """Convert a file of the Python archive to the form of the binary one."""
    batch = read_batch(part, "cifar-100-python.tar.gz", ("data", "fine_labels", "coarse_labels"))
    planes = batch["data"]
    columns = []
    if planes.dtype != np.uint8 or planes.shape[1:] != (3 * _PIXELS,):
        raise DataError(
            f"{part.path}: its data is {planes.dtype}{list(planes.shape)}; expected "
            f"uint8 [N, {3 * _PIXELS}]. Get it again."
        )
    for key in ("coarse_labels", "fine_labels"):
        labels = batch[key]
        if labels.shape != planes.shape[:1] or labels.dtype.kind not in "iu" or labels.min() < 0:
            raise DataError(
                f"{part.path}: its {key} are not {len(planes)} whole numbers from 0. Get it again."
            )
        if labels.max() > 255:
            raise DataError(f"{part.path}: its {key} go up to {labels.max()}. Get it again.")
        columns.append(labels[:, None].astype(np.uint8))
    return Part(np.concatenate([*columns, planes], axis=1).tobytes(), part.path)
