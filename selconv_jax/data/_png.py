"""PNG files of small images, in a form that is fast to read.

Prepared sets hold one PNG per image. `encode_png` writes all rows unfiltered and uncompressed (the
record files around them are compressed) in one chunk. `decode_image` reads this form several times as
fast as a general decoder, and all other images (PNG, JPEG, ...) with Pillow.
"""

import io
import struct
import zlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from selconv_jax.data._pixels import is_grey, to_8_bits

__all__ = ["decode_image", "encode_png"]

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOR_TYPES = {1: 0, 3: 2}  # channels to the format's code
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # channels to Pillow's mode
# Signature, then length and name of the header chunk, its fields, its checksum, and the length and
# name of the data chunk.
_HEAD = struct.Struct(">8s4x4sIIBBBBB4xI4s")
_END = struct.pack(">I4sI", 0, b"IEND", zlib.crc32(b"IEND"))


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """Write an image uint8 ``[H, W, C]`` as a PNG file; ``C`` is 1 (grey) or 3 (red, green, blue).

    Example:
        >>> pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
        >>> bool((decode_image(encode_png(pixels)) == pixels).all())
        True
    """
    height, width, channels = image.shape
    rows = np.zeros((height, 1 + width * channels), np.uint8)  # column 0: filter 0, "none"
    rows[:, 1:] = image.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOR_TYPES[channels], 0, 0, 0)
    return b"".join(
        [
            _SIGNATURE,
            _chunk(b"IHDR", header),
            _chunk(b"IDAT", zlib.compress(rows.tobytes(), level=0)),
            _END,
        ]
    )


def decode_image(data: bytes, channels: int | None = None) -> NDArray[np.uint8]:
    """Read an image file of any common format as uint8 ``[H, W, C]``, see `to_8_bits`.

    Args:
        data: The content of the file.
        channels: Convert to this number of channels, 1, 3 or 4; ``None``: grey images stay grey, all
            others become red, green and blue.

    Raises:
        ValueError: If the file is damaged or not an image; a `PixelError` if it is intact, but does not
            state the range of its values.
    """
    plain = _decode_plain(data)
    if plain is not None and channels in (None, plain.shape[2]):
        return plain
    try:
        with Image.open(io.BytesIO(data)) as image:
            mode = "L" if channels is None and is_grey(image) else _MODES[channels or 3]
            pixels = np.asarray(to_8_bits(image, mode))
    except (OSError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(str(error)) from error
    return pixels.reshape(*pixels.shape[:2], -1)


def _decode_plain(data: bytes) -> NDArray[np.uint8] | None:
    """Read a file of the form that `encode_png` writes; None for any other."""
    if len(data) < _HEAD.size + 4 + len(_END) or not data.startswith(_SIGNATURE):
        return None
    _, header, width, height, depth, color, _, _, interlace, size, name = _HEAD.unpack_from(data)
    if (header, depth, interlace, name) != (b"IHDR", 8, 0, b"IDAT") or color not in (0, 2):
        return None
    if len(data) != _HEAD.size + size + 4 + len(_END):
        return None
    try:
        content = zlib.decompress(data[_HEAD.size : _HEAD.size + size])
    except zlib.error as error:
        raise ValueError(str(error)) from error
    rows = np.frombuffer(content, np.uint8).reshape(height, -1)
    if rows[:, 0].any():  # a filtered row
        return None
    return rows[:, 1:].reshape(height, width, -1)


def _chunk(name: bytes, content: bytes) -> bytes:
    """Assemble a chunk of a PNG file."""
    checksum = zlib.crc32(content, zlib.crc32(name))
    return b"".join([struct.pack(">I", len(content)), name, content, struct.pack(">I", checksum)])
