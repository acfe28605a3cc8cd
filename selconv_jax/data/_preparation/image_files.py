"""Image files with labels that are read one at a time, for sets that do not fit into memory."""

import dataclasses
import io
import struct
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from PIL import Image

from selconv_jax._utils.console import Progress
from selconv_jax.data._catalog import KnownSet
from selconv_jax.data._pixels import to_8_bits
from selconv_jax.data._preparation.originals import check_counts
from selconv_jax.errors import DataError

__all__ = ["ImageFile", "ImageFiles", "as_color_jpeg", "verify_files"]

_REPORT_EVERY = 10_000


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """One file, whose content is read on demand.

    Attributes:
        name: Its name, unique within the split.
        label: Index of its class.
        path: Its location, for messages: a file, or an archive and a member of it.
        read: Returns its content; valid until the next file is requested.
    """

    name: str
    label: int
    path: str
    read: Callable[[], bytes]


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """The files of a data set: a function per split that starts a pass over them; classes by label."""

    class_names: tuple[str, ...]
    splits: Mapping[str, Callable[[], Iterator[ImageFile]]]


def verify_files(known: KnownSet, files: ImageFiles, progress: Progress) -> None:
    """Check the number of classes and files against the catalog, without reading the files."""
    if len(files.class_names) != known.num_classes:
        raise DataError(
            f"{known.name}: {len(files.class_names)} classes; expected {known.num_classes}. "
            f"Get it again from {known.origin}."
        )
    for key, expected in known.counts.items():
        per_class = np.zeros(known.num_classes, np.int64)
        task = f"Counting {key} images of {known.name}"
        for number, file in enumerate(files.splits[key]()):
            per_class[file.label] += 1
            if number % _REPORT_EVERY == 0 and number < expected:
                progress(task, number, expected)
        check_counts(known, key, per_class)
        progress(task, expected, expected)


def as_color_jpeg(content: bytes, size: tuple[int, int] | None = None) -> bytes:
    """Check that an image file can be read, and convert it unless it is a colour JPEG.

    Files with different numbers of channels would be read as arrays of different shapes and meanings.
    Grey images of any number of bits, CMYK images and files of other formats are therefore converted to
    JPEG of quality 100 without subsampling; colour JPEGs are returned byte for byte.

    Args:
        content: The content of the file.
        size: ``(height, width)`` that the image must have; None: any.

    Raises:
        ValueError: If the file is damaged, not an image, or of another size; a `PixelError` if it is
            intact, but does not state the range of its values.

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
