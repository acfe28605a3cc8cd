"""Conversion of images in any of Pillow's modes to 8 bits per channel."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["PixelError", "is_grey", "to_8_bits"]

# Formats whose 16-bit grey runs from 0 (black) to 65535 (white); others may use any range.
_WHOLE_RANGE = ("PNG", "PPM", "JPEG2000")
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
_WHITE_IS_ZERO, _UNSIGNED = 0, 1


class PixelError(ValueError):
    """An image is intact, but its file does not state the range of its values."""


def is_grey(image: Image.Image) -> bool:
    """Check whether an image has a single brightness channel, of any number of bits."""
    return image.mode in ("1", "L", "F") or image.mode.startswith("I")


def to_8_bits(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image to 8 bits per channel, preserving its brightness and colours.

    Pillow clips 16-bit and floating-point grey at 255, which turns it white. Here 16-bit grey is divided
    by 257 and rounded down, so that black is 0 and white is 255. For 16-bit colour, Pillow keeps the upper
    8 bits, which differ from that by at most 1.

    Args:
        image: As Pillow opened it.
        mode: Mode of the result, ``"L"``, ``"RGB"`` or ``"RGBA"``.

    Raises:
        PixelError: If the file does not state the range of its values (floating-point, signed and 32-bit
            grey), or Pillow cannot convert the mode.
        OSError: If the file is damaged.

    Example:
        >>> import io
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
