"""Reading of the idx files of Fashion-MNIST: images and labels as plain arrays after a short header.

An idx file starts with two zero bytes, the type of its items (8, unsigned byte), the number of
dimensions, and the dimensions as big-endian 32-bit integers; the items follow in row-major order.
"""

import gzip
import math
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from selconv_jax.data._catalog import KnownSet
from selconv_jax.data._dataset import Split
from selconv_jax.data._preparation.originals import Part, read_file
from selconv_jax.errors import DataError

_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_GZIP = b"\x1f\x8b"


def find_idx_files(known: KnownSet, source: Path) -> dict[str, Path]:
    """Find the four files in a folder, or below the root of an unpacked distribution package.

    Returns:
        Each file by its name without ``.gz``.
    """
    folders = [source, *(source / place.relative_to("/") for place in known.places)]
    names = [name for pair in _FILES.values() for name in pair]
    for folder in folders:
        found = {
            name: path for name in names for path in (folder / f"{name}.gz", folder / name) if path.is_file()
        }
        missing = [name for name in names if name not in found]
        if not missing:
            return found
        if found:
            raise DataError(
                f"{folder}: {missing[0]} (or {missing[0]}.gz) is missing. Get it from {known.origin}."
            )
    raise DataError(
        f"{source}: not a folder with {', '.join(names)} (each may end in .gz). Get them from {known.origin}."
    )


def read_idx_files(files: Mapping[str, Path]) -> dict[str, Part]:
    """Read files by name, unpacking those that are packed with gzip."""
    parts = {}
    for name, path in files.items():
        content = read_file(path)
        if content.startswith(_GZIP):
            try:
                content = gzip.decompress(content)
            except (OSError, EOFError, zlib.error) as error:
                raise DataError(f"{path}: damaged or cut short ({error}). Get the file again.") from error
        parts[name] = Part(content, str(path))
    return parts


def decode_idx(parts: Mapping[str, Part]) -> dict[str, Split]:
    """Decode the files to ``train`` and ``test``; images uint8 ``[N, H, W, 1]``, labels int32 ``[N]``."""
    splits = {}
    for split, (images_name, labels_name) in _FILES.items():
        images = _decode_array(parts[images_name], dimensions=3)
        labels = _decode_array(parts[labels_name], dimensions=1)
        if len(images) != len(labels):
            raise DataError(
                f"{parts[images_name].path} has {len(images)} images, "
                f"{parts[labels_name].path} has {len(labels)} labels; get both files again."
            )
        splits[split] = Split(images[..., None], labels.astype(np.int32))
    return splits


def _decode_array(part: Part, dimensions: int) -> NDArray[np.uint8]:
    """Decode an idx file to a uint8 array with the given number of dimensions."""
    start = 4 + 4 * dimensions
    magic = bytes([0, 0, 8, dimensions])
    if part.content[:4] != magic or len(part.content) < start:
        raise DataError(
            f"{part.path}: not an idx file of bytes in {dimensions} dimensions (it starts with "
            f"{part.content[:4].hex(' ')}, expected {magic.hex(' ')}). Get the file again."
        )
    shape = struct.unpack_from(f">{dimensions}I", part.content, 4)
    if len(part.content) - start != math.prod(shape):
        raise DataError(
            f"{part.path}: {len(part.content) - start} bytes of data for an array of shape "
            f"{list(shape)}; the file is damaged or cut short. Get the file again."
        )
    return np.frombuffer(part.content, np.uint8, offset=start).reshape(shape)
