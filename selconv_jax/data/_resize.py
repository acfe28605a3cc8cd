"""Resizing of images to one size: random crops for training, centre crops for testing.

It runs on the host, where images are decoded, with Pillow's antialiased bilinear filter.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_SCALES = (0.08, 1.0)
_RATIOS = (3 / 4, 4 / 3)
_ATTEMPTS = 10


def random_box(height: int, width: int, generator: np.random.Generator) -> tuple[int, int, int, int]:
    """Draw ``(top, left, height, width)`` of a random box in an image, in whole pixels.

    Its fraction of the area is uniform in [0.08, 1], and the logarithm of its aspect ratio (width by height)
    is uniform between those of 3/4 and 4/3. After ten draws that do not fit into the image, the box is the
    largest centred one with an aspect ratio within these bounds.
    """
    for _ in range(_ATTEMPTS):
        area = height * width * generator.uniform(*_SCALES)
        ratio = np.exp(generator.uniform(*np.log(_RATIOS)))
        box_height, box_width = round(np.sqrt(area / ratio)), round(np.sqrt(area * ratio))
        if 0 < box_height <= height and 0 < box_width <= width:
            top = int(generator.integers(height - box_height + 1))
            left = int(generator.integers(width - box_width + 1))
            return top, left, box_height, box_width
    box_height = min(height, round(width / _RATIOS[0]))
    box_width = min(width, round(height * _RATIOS[1]))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def random_resized_crop(
    image: NDArray[np.uint8], size: tuple[int, int], generator: np.random.Generator
) -> NDArray[np.uint8]:
    """Crop a random box of an image uint8 ``[H, W, C]`` and resize it to ``[*size, C]``, see `random_box`."""
    top, left, height, width = random_box(image.shape[0], image.shape[1], generator)
    return _resize(image[top : top + height, left : left + width], size)


def resized_center_crop(
    image: NDArray[np.uint8], size: tuple[int, int], shorter_side: int
) -> NDArray[np.uint8]:
    """Resize an image uint8 ``[H, W, C]``, preserving its aspect ratio, and crop the centre ``[*size, C]``.

    ``shorter_side``, the pixels of the shorter side after resizing, is at least the larger of ``size``.
    """
    height, width = image.shape[:2]
    shorter = min(height, width)
    height, width = height * shorter_side // shorter, width * shorter_side // shorter
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    return _resize(image, (height, width))[top : top + size[0], left : left + size[1]]


def _resize(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize an image, which has a channel axis even if it is grey."""
    pixels = image[..., 0] if image.shape[2] == 1 else image
    resized = Image.fromarray(np.ascontiguousarray(pixels)).resize(size[::-1], Image.Resampling.BILINEAR)
    return np.asarray(resized).reshape(*size, image.shape[2])
