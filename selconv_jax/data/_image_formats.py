"""Image files: any of Pillow's formats and modes to 8 bits per channel, and PNG files that are fast to read.

Prepared sets hold one PNG per image. `encode_png` writes all rows unfiltered and uncompressed (the
record files around them are compressed) in one chunk. `decode_image` reads this form several times as
fast as a general decoder, and all other images (PNG, JPEG, ...) with Pillow.
"""

import io
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOR_TYPES = {1: 0, 3: 2}  # channels to the format's code
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # channels to Pillow's mode
# Signature, then length and name of the header chunk, its fields, its checksum, and the length and
# name of the data chunk.
_HEAD = struct.Struct(">8s4x4sIIBBBBB4xI4s")
_END = struct.pack(">I4sI", 0, b"IEND", zlib.crc32(b"IEND"))

# Formats whose 16-bit grey runs from 0 (black) to 65535 (white); others may use any range.
_WHOLE_RANGE = ("PNG", "PPM", "JPEG2000")
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
_WHITE_IS_ZERO, _UNSIGNED = 0, 1


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
        [_SIGNATURE, _chunk(b"IHDR", header), _chunk(b"IDAT", zlib.compress(rows.tobytes(), level=0)), _END]
    )


def decode_image(data: bytes, channels: int | None = None) -> NDArray[np.uint8]:
    """Read an image file of any common format as uint8 ``[H, W, C]``.

    The number of ``channels`` is 1, 3 or 4; None: grey images stay grey, all others become red, green and
    blue. A file that is damaged or not an image is a ValueError; see `to_8_bits` for the `PixelError`.
    """
    plain = _decode_plain(data)
    if plain is not None and channels in (None, plain.shape[2]):
        return plain
    try:
        with Image.open(io.BytesIO(data)) as image:
            grey = image.mode in ("1", "L", "F") or image.mode.startswith("I")
            mode = "L" if channels is None and grey else _MODES[channels or 3]
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


class PixelError(ValueError):
    """An image is intact, but its file does not state the range of its values."""


def to_8_bits(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image to ``"L"``, ``"RGB"`` or ``"RGBA"``, preserving its brightness and colours.

    Pillow clips 16-bit and floating-point grey at 255, which turns it white. Here 16-bit grey is divided
    by 257 and rounded down, so that black is 0 and white is 255. For 16-bit colour, Pillow keeps the upper
    8 bits, which differ from that by at most 1.

    Raises:
        PixelError: If the file does not state the range of its values (floating-point, signed and 32-bit
            grey), or Pillow cannot convert the mode.
        OSError: If the file is damaged.

    Example:
        >>> file = io.BytesIO()
        >>> Image.fromarray(np.array([[0, 256, 257, 65535]], np.uint16)).save(file, "PNG")
        >>> np.asarray(to_8_bits(Image.open(file), "L")).tolist()
        [[0, 0, 1, 255]]
    """
    image.load()  # the result outlives the file
    tiff: Mapping[int, Any] = getattr(image, "tag_v2", {})
    white = _white(image, tiff)
    if white is not None:
        values: NDArray[np.integer] = np.asarray(image).astype(np.uint32)
        if tiff.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            values = white - values
        image = Image.fromarray((values * 255 // white).astype(np.uint8))
    if image.mode == mode:
        return image
    try:
        return image.convert(mode)
    except ValueError:  # no direct conversion, for example from LAB to grey
        try:
            return image.convert("RGB").convert(mode)
        except ValueError as error:
            raise _refusal(image) from error


def _white(image: Image.Image, tiff: Mapping[int, Any]) -> int | None:
    """Return the value of white in grey of more than 8 bits; None for images of at most 8 bits."""
    if any(kind != _UNSIGNED for kind in tiff.get(_SAMPLE_FORMAT, ())):
        raise _refusal(image)
    if image.mode.startswith("I;16") and image.format == "TIFF":
        return (1 << tiff[_BITS_PER_SAMPLE][0]) - 1
    if image.mode.startswith("I;16") and image.format in _WHOLE_RANGE:
        return 0xFFFF
    if image.mode == "I" and image.format in ("PNG", "PPM"):  # of 16 bits in the file
        return 0xFFFF
    if image.mode == "F" or image.mode.startswith("I"):
        raise _refusal(image)
    return None


def _refusal(image: Image.Image) -> PixelError:
    return PixelError(
        f"its pixels are of Pillow's mode {image.mode}, for which a {image.format} file does not state "
        "which number is white. Save the image again with 8 bits per channel."
    )


def as_color_jpeg(content: bytes, size: tuple[int, int] | None = None) -> bytes:
    """Check that an image file can be read, and convert it unless it is a colour JPEG.

    Files with different numbers of channels would be read as arrays of different shapes and meanings.
    Grey images of any number of bits, CMYK images and files of other formats are therefore converted to
    JPEG of quality 100 without subsampling; colour JPEGs are returned byte for byte. A file that is damaged,
    not an image, or not of ``size`` (height, width) is a ValueError; see `to_8_bits` for the `PixelError`.

    Example:
        >>> buffer = io.BytesIO()
        >>> Image.new("L", (8, 8)).save(buffer, "JPEG")
        >>> Image.open(io.BytesIO(as_color_jpeg(buffer.getvalue()))).mode
        'RGB'
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            if size is not None and (image.height, image.width) != size:
                raise ValueError(f"an image of {image.height}x{image.width}, expected {size[0]}x{size[1]}")
            if image.format == "JPEG" and image.mode == "RGB":
                # Reads the whole file, but decodes only an eighth of the rows and columns.
                image.draft("RGB", (1, 1))
                image.load()
                return content
            converted = to_8_bits(image, "RGB")
    except (OSError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(str(error)) from error
    buffer = io.BytesIO()
    converted.save(buffer, "JPEG", quality=100, subsampling=0)
    return buffer.getvalue()
