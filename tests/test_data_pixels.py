"""Images of more than 8 bits, and of every mode that Pillow knows."""

import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from prepared_sets import write_set
from selconv_jax.data import load, open_data
from selconv_jax.data._image_formats import PixelError, as_color_jpeg, decode_image, to_8_bits
from selconv_jax.errors import DataError

RAMP = (np.arange(64, dtype=np.uint16) * 1024).reshape(8, 8)
GREY = (RAMP // 257).astype(np.uint8)
WHITE_IS_ZERO = {262: 0}


def saved(image, file_format="PNG", **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def big_endian(mode="I;16B"):
    return Image.frombytes(mode, (8, 8), RAMP.astype(">u2").tobytes())


SIXTEEN_BITS = {
    "png": saved(Image.fromarray(RAMP)),
    "tiff": saved(Image.fromarray(RAMP), "TIFF"),
    "packed tiff": saved(Image.fromarray(RAMP), "TIFF", compression="tiff_lzw"),
    "big-endian tiff": saved(big_endian(), "TIFF"),
    "tiff in which 0 is white": saved(Image.fromarray(0xFFFF - RAMP), "TIFF", tiffinfo=WHITE_IS_ZERO),
    "jpeg 2000": saved(Image.fromarray(RAMP), "JPEG2000", irreversible=False),
    "pgm": saved(Image.fromarray(RAMP), "PPM"),
    "plain pgm": b"P2 8 8 65535 " + " ".join(map(str, RAMP.ravel())).encode(),
    "pgm up to 1023": b"P2 8 8 1023 " + " ".join(str(value // 64) for value in RAMP.ravel()).encode(),
}


@pytest.mark.parametrize("kind", SIXTEEN_BITS)
def test_grey_of_16_bits_stays_a_ramp(kind):
    content = SIXTEEN_BITS[kind]
    np.testing.assert_allclose(decode_image(content, 1)[..., 0].astype(int), GREY, atol="1023" in kind)
    grey = decode_image(content)
    assert grey.shape == (8, 8, 1)
    np.testing.assert_array_equal(decode_image(content, 3), np.repeat(grey, 3, axis=2))
    np.testing.assert_array_equal(decode_image(content, 4)[..., :3], np.repeat(grey, 3, axis=2))
    np.testing.assert_array_equal(decode_image(content, 4)[..., 3], 255)
    # Of quality 100: off by rounding only.
    assert np.abs(decode_image(as_color_jpeg(content)).astype(int) - grey.astype(int)).max() <= 2


def test_tiffs_of_12_bits():
    values = (RAMP.ravel() >> 4).astype(int)
    bits = "".join(f"{value:012b}" for value in values)
    packed = bytes(int(bits[at : at + 8], 2) for at in range(0, len(bits), 8))
    whole = saved(Image.fromarray(RAMP), "TIFF")
    with Image.open(io.BytesIO(whole)) as image:
        start = image.tag_v2[273][0]
    # The entry of the bits per sample: tag 258, of type 3, one value.
    entry = (258).to_bytes(2, "little") + (3).to_bytes(2, "little") + (1).to_bytes(4, "little")
    assert entry + b"\x10" in whole
    content = whole[:start].replace(entry + b"\x10", entry + b"\x0c") + packed + whole[start + 128 :]
    np.testing.assert_array_equal(decode_image(content, 1)[..., 0].ravel(), values * 255 // 4095)


@pytest.mark.parametrize("mode", [mode for mode in Image.MODES if mode not in ("F", "I", "La", "1")])
@pytest.mark.parametrize("wanted", ["L", "RGB", "RGBA"])
def test_every_mode_is_converted_by_value(mode, wanted):
    """A grey of 77 in any mode is one of 77 in any other."""
    source = Image.new("L", (4, 4), 77)
    if mode.startswith("I;16"):
        dtype = ">u2" if mode == "I;16B" else "<u2"
        image = Image.frombytes(mode, (4, 4), np.full((4, 4), 77 * 257).astype(dtype).tobytes())
        image.format = "PNG"
    elif mode == "LAB":
        image = Image.new("LAB", (4, 4), (83, 128, 128))  # 32.5 of 100 is the lightness of 77 of 255
    elif mode == "RGBa":
        image = source.convert("RGBA").convert("RGBa")
    elif mode == "HSV":
        image = source.convert("RGB").convert("HSV")
    else:
        image = source.convert(mode)
    converted = to_8_bits(image, wanted)
    assert converted.mode == wanted
    pixels = np.asarray(converted).reshape(4, 4, -1).astype(int)
    assert np.abs(pixels[..., :3] - 77).max() <= (2 if mode == "LAB" else 1)


FLOAT = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
REFUSED = {
    "F, for which a TIFF file": saved(Image.fromarray(FLOAT), "TIFF"),
    "I, for which a TIFF file": saved(Image.fromarray(RAMP.astype(np.int32)), "TIFF"),
    "F, for which a PPM file": saved(Image.fromarray(FLOAT), "PPM"),
    "F, for which a SPIDER file": saved(Image.fromarray(FLOAT), "SPIDER"),
    # Signed numbers of 8 bits, which Pillow takes for unsigned ones.
    "L, for which a TIFF file": saved(Image.fromarray(GREY), "TIFF", tiffinfo={339: 2}),
}


@pytest.mark.parametrize("mode", REFUSED)
def test_modes_without_a_range_are_refused_by_name(mode):
    for read in (decode_image, lambda content: decode_image(content, 3), as_color_jpeg):
        with pytest.raises(PixelError, match=f"Pillow's mode {mode} does not state which number is white"):
            read(REFUSED[mode])


def prepared(tmp_path, content):
    features = {
        "image": tfds.features.Image(shape=(8, 8, 1)),
        "label": tfds.features.ClassLabel(num_classes=1),
    }
    part = [{"image": content, "label": 0}] * 2
    write_set(tmp_path, "toy_pictures", {"train": part, "test": part}, features)


def test_prepared_sets_of_16_bits(tmp_path):
    prepared(tmp_path, SIXTEEN_BITS["png"])
    for data in (load("toy_pictures", tmp_path), open_data("toy_pictures", tmp_path, streaming=True)):
        np.testing.assert_array_equal(data.train[1][0][..., 0], GREY)


def test_prepared_sets_of_floating_numbers_are_refused_by_name(tmp_path):
    prepared(tmp_path, REFUSED["F, for which a TIFF file"])
    for streaming in (False, True):
        with pytest.raises(DataError, match=r"record \d: its pixels are of Pillow's mode F") as error:
            open_data("toy_pictures", tmp_path, streaming=streaming)
        assert "damaged" not in str(error.value)
