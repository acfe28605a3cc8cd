"""Tiny-ImageNet and ImageNet from small archives in the original formats."""

import io
import pickle
import zipfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

import tiny_sets
from selconv_jax.data import load, open_data
from selconv_jax.data._catalog import KNOWN
from selconv_jax.data._image_formats import as_color_jpeg, decode_image
from selconv_jax.data._preparation.prepare import prepare
from selconv_jax.data._stream import ImageReader, stream_batches
from selconv_jax.errors import DataError

TINY = tiny_sets.tiny_imagenet_files()
TRAIN, VALIDATION = tiny_sets.imagenet_train(), tiny_sets.imagenet_validation()


def silent(task, done, total):
    pass


@pytest.fixture(autouse=True)
def _tiny_catalog(monkeypatch):
    tiny = tiny_sets.entry("tiny_imagenet", num_classes=3, counts={"train": 9, "validation": 6})
    whole = tiny_sets.entry("imagenet2012", counts={"train": 8, "validation": 5})
    monkeypatch.setitem(KNOWN, "tiny_imagenet", tiny)
    monkeypatch.setitem(KNOWN, "imagenet2012", whole)


@pytest.fixture
def data_dir(tmp_path):
    return tmp_path / "sets"


def records(name, split, data_dir):
    """Label and content of each file of a prepared split, by file name."""
    decoders = {"image": tfds.decode.SkipDecoding()}
    source = tfds.data_source(name, split=split, data_dir=data_dir, decoders=decoders)
    return {example["file_name"].decode(): (int(example["label"]), example["image"]) for example in source}


# Tiny-ImageNet


def tiny_sources(tmp_path):
    folder = tiny_sets.write_folder(tmp_path / "a" / "tiny-imagenet-200", TINY)
    archive = tiny_sets.write_zip(tmp_path / "b" / "tiny-imagenet-200.zip", TINY)
    return {"zip": archive, "its folder": archive.parent, "unpacked": folder, "above": folder.parent}


@pytest.mark.parametrize("form", ["zip", "its folder", "unpacked", "above"])
def test_tiny_imagenet(tmp_path, data_dir, form):
    (tmp_path / "b").mkdir()
    prepare("tiny_imagenet", tiny_sources(tmp_path)[form], data_dir, silent)
    train, validation = (records("tiny_imagenet", key, data_dir) for key in ("train", "validation"))
    wnids = sorted(tiny_sets.WNIDS)
    assert {name: label for name, (label, _) in train.items()} == {
        f"{wnid}_{index}.JPEG": label for label, wnid in enumerate(wnids) for index in range(3)
    }
    for name, (_, content) in train.items():
        assert content == TINY[f"train/{name[:3]}/images/{name}"]  # byte for byte
    # Numbers 0, 1, 2 are of the classes in the order of wnids.txt, and so on.
    assert {name: wnids[label] for name, (label, _) in validation.items()} == {
        f"val_{number}.JPEG": tiny_sets.WNIDS[number % 3] for number in range(6)
    }


def test_tiny_imagenet_loads(tmp_path, data_dir):
    prepare("tiny_imagenet", tiny_sets.write_zip(tmp_path / "x.zip", TINY), data_dir, silent)
    data = load("tiny_imagenet", data_dir)
    assert data.info.class_names == ("n01", "n02", "n03")
    assert (data.info.image_shape, data.info.crop_padding, data.info.flip) == ((64, 64, 3), 8, True)
    assert (len(data.train), len(data.test)) == (9, 6)
    streamed = open_data("tiny_imagenet", data_dir, streaming=True)
    for key in ("train", "test"):
        whole = getattr(data, key)
        for index, image in enumerate(whole.images):
            actual, label = getattr(streamed, key)[index]
            np.testing.assert_array_equal(actual, image)
            assert label == whole.labels[index]


def changed(**files):
    return {**TINY, **{name.replace("__", "/"): content for name, content in files.items()}}


FIRST = "train/n01/images/n01_0.JPEG"


def content_of(image, file_format):
    file = io.BytesIO()
    image.save(file, file_format)
    return file.getvalue()


FLOAT_TIFF = content_of(Image.new("F", (64, 64), 0.5), "TIFF")
DEEP_GREY = content_of(Image.fromarray(np.full((64, 64), 77 * 257, np.uint16)), "PNG")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({**TINY, FIRST: TINY[FIRST][:400]}, f"{FIRST}: cannot be read as an image"),
        ({**TINY, FIRST: b""}, f"{FIRST}: cannot be read as an image"),
        ({**TINY, FIRST: FLOAT_TIFF}, f"{FIRST}: its pixels are of Pillow's mode F, for which a TIFF file"),
        (
            {**TINY, FIRST: tiny_sets.jpeg(0, size=(64, 63))},
            f"{FIRST}: cannot be read .*an image of 64x63, expected 64x64",
        ),
        ({**TINY, "wnids.txt": b"n01 n02"}, "2 classes; expected 3"),
        ({key: TINY[key] for key in TINY if key != FIRST}, "train split: 8 images, 2 to 3 per class"),
        ({key: TINY[key] for key in TINY if key != "wnids.txt"}, "there is no wnids.txt"),
        (
            {key: TINY[key] for key in TINY if "annotations" not in key},
            "val_annotations.txt: the file is missing",
        ),
        (
            {**TINY, "val/val_annotations.txt": b"val_0.JPEG n01"},
            "val_annotations.txt, line 1: 'val_0.JPEG n01'",
        ),
    ],
)
def test_damaged_tiny_imagenet_is_named_and_leaves_nothing(tmp_path, data_dir, files, message):
    with pytest.raises(DataError, match=message):
        prepare("tiny_imagenet", tiny_sets.write_zip(tmp_path / "x.zip", files), data_dir, silent)
    assert not data_dir.exists() or not list(data_dir.iterdir())


def test_damaged_zip(tmp_path, data_dir):
    archive = tiny_sets.write_zip(tmp_path / "x.zip", TINY)
    content = archive.read_bytes()
    archive.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"x\.zip: damaged, cut short, or not a zip archive"):
        prepare("tiny_imagenet", archive, data_dir, silent)
    with zipfile.ZipFile(io.BytesIO(content)) as whole:
        start = whole.getinfo(f"tiny-imagenet-200/{FIRST}").header_offset + 200
    archive.write_bytes(content[:start] + bytes([content[start] ^ 255]) + content[start + 1 :])
    with pytest.raises(DataError, match=f"{FIRST}: damaged"):
        prepare("tiny_imagenet", archive, data_dir, silent)
    with pytest.raises(DataError, match=r"neither tiny-imagenet-200\.zip nor wnids\.txt"):
        prepare("tiny_imagenet", data_dir.parent, data_dir, silent)


# ImageNet


def imagenet_folders(folder):
    files = {f"train/{wnid}/{name}": content for wnid in TRAIN for name, content in TRAIN[wnid].items()}
    files |= {f"val/{name}": content for name, content in VALIDATION.items()}
    return tiny_sets.write_folder(folder, files)


@pytest.mark.parametrize("form", ["archives", "one archive", "folders"])
def test_imagenet(tmp_path, data_dir, form):
    folder = tmp_path / "x"
    source = imagenet_folders(folder) if form == "folders" else tiny_sets.write_imagenet(folder)
    prepare(
        "imagenet2012",
        source / "ILSVRC2012_img_val.tar" if form == "one archive" else source,
        data_dir,
        silent,
    )
    train, validation = (records("imagenet2012", key, data_dir) for key in ("train", "validation"))
    for label, wnid in ((0, "n01440764"), (999, "n15075141")):
        for name, content in TRAIN[wnid].items():
            assert train.pop(name) == (label, content)
    assert not train
    # The first published labels: n01751748, n09193705, n02105855, n04263257, n03125729.
    names = tfds.builder("imagenet2012", data_dir=data_dir).info.features["label"].names
    assert [names[validation[name][0]] for name in sorted(validation)][:3] == [
        "n01751748",
        "n09193705",
        "n02105855",
    ]
    assert {name: content for name, (_, content) in validation.items()} == VALIDATION


def test_imagenet_is_streamed(tmp_path, data_dir):
    prepare("imagenet2012", tiny_sets.write_imagenet(tmp_path / "x"), data_dir, silent)
    data = open_data("imagenet2012", data_dir)
    assert (data.info.image_shape, data.info.eval_resize, data.info.num_classes) == ((224, 224, 3), 256, 1000)
    assert data.info.class_names[0] == "n01440764"
    files = {decode_image(content).tobytes() for part in TRAIN.values() for content in part.values()}
    train = pickle.loads(pickle.dumps(data.train))  # as workers get it
    assert {train[index][0].tobytes() for index in range(len(train))} == files
    reader = ImageReader(train, data.info, seed=(1, 2))
    ((images, labels),) = stream_batches(reader, np.arange(8, dtype=np.int32), 8)
    assert images.shape == (8, 224, 224, 3)
    assert sorted(labels.tolist()) == [0] * 4 + [999] * 4
    for refused in (
        lambda: load("imagenet2012", data_dir),
        lambda: open_data("imagenet2012", data_dir, False),
    ):
        with pytest.raises(DataError, match="differ in size, so that it can only be streamed"):
            refused()


def test_validation_images_in_folders_of_their_class(tmp_path, data_dir):
    folder = imagenet_folders(tmp_path / "x")
    (folder / "val" / "n15075141").mkdir()
    for name in VALIDATION:
        (folder / "val" / name).rename(folder / "val" / "n15075141" / name)
    prepare("imagenet2012", folder, data_dir, silent)
    assert {label for label, _ in records("imagenet2012", "validation", data_dir).values()} == {999}


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        ({**TRAIN, "n00000000": {"a.JPEG": b""}}, VALIDATION, "'n00000000' is none of the 1,000 classes"),
        ({"n01440764": TRAIN["n01440764"]}, VALIDATION, "train split: 4 images, .* expected 8"),
        (
            {**TRAIN, "n01440764": {**TRAIN["n01440764"], "n01440764_0.JPEG": b"no image"}},
            VALIDATION,
            r"ILSVRC2012_img_train\.tar, n01440764\.tar, n01440764_0\.JPEG: cannot be read as an image",
        ),
        (TRAIN, {**VALIDATION, "picture.JPEG": b""}, "picture.JPEG: the label of this file is not known"),
        (TRAIN, {**VALIDATION, "ILSVRC2012_val_00050001.JPEG": b""}, "50001.JPEG: the label of this file"),
    ],
)
def test_damaged_imagenet_is_named_and_leaves_nothing(tmp_path, data_dir, train, validation, message):
    source = tiny_sets.write_imagenet(tmp_path / "x", train, validation)
    with pytest.raises(DataError, match=message):
        prepare("imagenet2012", source, data_dir, silent)
    assert not data_dir.exists() or not list(data_dir.iterdir())


def test_cut_imagenet_archive_is_named(tmp_path, data_dir):
    source = tiny_sets.write_imagenet(tmp_path / "x")
    archive = source / "ILSVRC2012_img_train.tar"
    archive.write_bytes(archive.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"ILSVRC2012_img_train\.tar.*(damaged, cut short|expected 8)"):
        prepare("imagenet2012", source, data_dir, silent)
    archive.unlink()
    with pytest.raises(DataError, match=r"neither ILSVRC2012_img_train\.tar nor a folder train"):
        prepare("imagenet2012", source, data_dir, silent)


@pytest.mark.parametrize("name", ["tiny_imagenet", "imagenet2012"])
def test_without_files_it_is_said_where_to_get_them(data_dir, name):
    with pytest.raises(DataError, match=f"cannot be downloaded .*selconv data prepare {name} --from PATH"):
        prepare(name, None, data_dir, silent)
    assert not data_dir.exists()


# Conversion


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_colors_are_converted(mode):
    content = tiny_sets.jpeg(5, mode, (20, 30))
    converted = as_color_jpeg(content)
    assert converted != content
    with Image.open(io.BytesIO(content)) as before, Image.open(io.BytesIO(converted)) as after:
        assert (after.format, after.mode, after.size) == ("JPEG", "RGB", (30, 20))
        expected = np.asarray(before.convert("RGB"), np.int32)
        # Quality 100 without subsampling: off by rounding only.
        assert np.abs(np.asarray(after, np.int32) - expected).max() <= 3


def test_png_is_converted_and_color_kept():
    image = Image.new("RGB", (8, 8), (200, 30, 60))
    buffer = io.BytesIO()
    image.save(buffer, "png")
    pixels = decode_image(as_color_jpeg(buffer.getvalue()))
    assert np.abs(pixels.astype(int) - np.array([200, 30, 60])).max() <= 2
    content = tiny_sets.jpeg(1)
    assert as_color_jpeg(content, (64, 64)) is content


def test_grey_training_images_become_colored(tmp_path, data_dir):
    second = FIRST.replace("_0", "_1")
    files = {**TINY, FIRST: tiny_sets.jpeg(3, "L"), second: DEEP_GREY}
    prepare("tiny_imagenet", tiny_sets.write_zip(tmp_path / "x.zip", files), data_dir, silent)
    contents = records("tiny_imagenet", "train", data_dir)
    assert decode_image(contents["n01_0.JPEG"][1]).shape == (64, 64, 3)
    np.testing.assert_allclose(decode_image(contents["n01_1.JPEG"][1]).astype(int), 77, atol=1)
