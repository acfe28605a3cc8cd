"""Image files: written plainly, read back from every common form."""

import io

import numpy as np
import pytest
from PIL import Image

from selconv_jax.data import _image_formats as png
from selconv_jax.data._image_formats import decode_image, encode_png


def random_image(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def saved(image, file_format, **options):
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, file_format, **options)
    return buffer.getvalue()


SHAPES = [(1, 1, 1), (28, 28, 1), (32, 32, 3), (5, 7, 3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_written_images_are_read_back_here_and_by_pillow(shape, monkeypatch):
    image = random_image(shape)
    content = encode_png(image)
    with Image.open(io.BytesIO(content)) as other:
        other.verify()
    with Image.open(io.BytesIO(content)) as other:
        np.testing.assert_array_equal(np.asarray(other).reshape(shape), image)
    monkeypatch.setattr(png, "Image", None)  # the fast way needs no Pillow
    np.testing.assert_array_equal(decode_image(content), image)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("file_format", ["png", "bmp", "tiff"])
def test_files_of_others(shape, file_format):
    image = np.sort(random_image(shape), axis=0)  # smooth, so that PNG rows are filtered
    np.testing.assert_array_equal(decode_image(saved(image, file_format)), image)


def test_unfiltered_png_of_another_level():
    image = random_image((9, 9, 3))
    content = saved(image, "png", compress_level=0)
    np.testing.assert_array_equal(decode_image(content), image)


def test_conversion_of_channels():
    grey = random_image((6, 5, 1))
    np.testing.assert_array_equal(decode_image(encode_png(grey), 3), np.repeat(grey, 3, axis=2))
    colour = np.repeat(grey, 3, axis=2)
    np.testing.assert_array_equal(decode_image(encode_png(colour), 1), grey)
    with_alpha = np.concatenate([colour, np.full_like(grey, 255)], axis=2)
    np.testing.assert_array_equal(decode_image(saved(with_alpha, "png")), colour)
    np.testing.assert_array_equal(decode_image(saved(with_alpha, "png"), 4), with_alpha)
    palette = io.BytesIO()
    Image.fromarray(colour).convert("P").save(palette, "png")
    assert decode_image(palette.getvalue()).shape == (6, 5, 3)


@pytest.mark.parametrize("writer", [encode_png, lambda image: saved(image, "png")])
def test_damaged_files_are_errors(writer):
    content = writer(random_image((32, 32, 3)))
    damaged = bytearray(content)
    damaged[60] ^= 255
    wide = bytearray(content)
    wide[19] = 77  # the width
    for bad in (b"", b"no image", content[:30], content[:60], content[:-100], bytes(damaged), bytes(wide)):
        with pytest.raises(ValueError, match=r"\w"):
            decode_image(bad)
