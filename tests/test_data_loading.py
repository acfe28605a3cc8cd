"""Loading other sets of tensorflow-datasets, and every way in which a prepared set can be bad."""

import io
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

import tiny_sets
from prepared_sets import examples, images, write_set
from selconv_jax.data import StreamedData, load, open_data
from selconv_jax.data import _loading as loading
from selconv_jax.data._augment import normalize
from selconv_jax.data._catalog import KNOWN
from selconv_jax.data._image_formats import encode_png
from selconv_jax.data._preparation.prepare import prepare
from selconv_jax.errors import DataError

CIFAR = tiny_sets.splits(32, 32, 3)


@pytest.mark.parametrize("test_name", ["test", "validation"])
@pytest.mark.parametrize("shape", [(20, 24, 3), (9, 9, 1)])
def test_other_sets(tmp_path, shape, test_name):
    train, test = images(30, shape), images(8, shape, seed=1)
    write_set(tmp_path, "toy_pictures", {"train": examples(train), test_name: examples(test)})
    data = load("toy_pictures", tmp_path)
    info = data.info
    assert (info.name, info.image_shape, info.num_classes) == ("toy_pictures", shape, 2)
    assert (info.class_names, info.flip) == (("cat", "dog"), True)
    assert info.crop_padding == {20: 2, 9: 1}[shape[0]]
    np.testing.assert_allclose(info.mean, (train / 255).mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(info.std, (train / 255).std((0, 1, 2)), rtol=1e-12)
    for split, original in ((data.train, train), (data.test, test)):
        places = {picture.tobytes(): number for number, picture in enumerate(original)}
        order = [places[picture.tobytes()] for picture in split.images]
        assert sorted(order) == list(range(len(original)))
        assert split.labels.tolist() == [number % 2 for number in order]


@pytest.mark.parametrize("value", [0, 255, 201])
def test_a_channel_of_one_value_becomes_zero(tmp_path, value):
    """Such as alpha where everything is opaque."""
    pictures = np.concatenate([images(6, (8, 8, 3)), np.full((6, 8, 8, 1), value, np.uint8)], axis=3)
    files = []
    for picture in pictures:
        files.append(io.BytesIO())
        Image.fromarray(picture).save(files[-1], "png")
    part = [{"image": file.getvalue(), "label": 0} for file in files]
    features = {
        "image": tfds.features.Image(shape=(8, 8, 4)),
        "label": tfds.features.ClassLabel(num_classes=1),
    }
    write_set(tmp_path, "toy_pictures", {"train": part, "test": part}, features)
    for streaming in (False, True):
        info = open_data("toy_pictures", tmp_path, streaming=streaming).info
        np.testing.assert_allclose(info.std, [*(pictures[..., :3] / 255).std((0, 1, 2)), 1], rtol=1e-12)
        normalized = normalize(pictures, info.mean, info.std, jnp.float32)
        np.testing.assert_allclose(normalized[..., 3], 0, atol=1e-6)
        np.testing.assert_allclose(np.std(normalized[..., :3], (0, 1, 2)), 1, rtol=1e-5)


def test_test_split_is_preferred_to_validation(tmp_path):
    pictures = images(8, (8, 8, 1))
    splits = {"train": pictures, "validation": pictures[:2], "test": pictures[:3]}
    write_set(tmp_path, "toy_pictures", {key: examples(part) for key, part in splits.items()})
    assert len(load("toy_pictures", tmp_path).test) == 3


def test_name_with_config_and_version(tmp_path):
    splits = {key: examples(images(4, (8, 8, 3))) for key in ("train", "test")}
    write_set(tmp_path, "toy_pictures", splits, config="small")
    for name in ("toy_pictures/small", "toy_pictures/small:1.2.3"):
        assert load(name, tmp_path).info.name == name


def test_jpeg_and_grey_files_are_converted_to_the_stated_channels(tmp_path):
    grey = np.full((16, 16), 77, np.uint8)
    content = io.BytesIO()
    Image.fromarray(grey).save(content, "jpeg")
    files = [content.getvalue(), encode_png(grey[..., None]), encode_png(images(1, (16, 16, 3))[0])]
    splits = {key: [{"image": file, "label": 0} for file in files] for key in ("train", "test")}
    features = {
        "image": tfds.features.Image(shape=(16, 16, 3)),
        "label": tfds.features.ClassLabel(num_classes=1),
    }
    write_set(tmp_path, "toy_pictures", splits, features)
    data = load("toy_pictures", tmp_path)
    assert data.train.images.shape == (3, 16, 16, 3)
    assert sum((picture == 77).all() for picture in data.train.images) == 2


def expect(tmp_path, message, name="toy_pictures"):
    with pytest.raises(DataError, match=message):
        load(name, tmp_path)


def test_images_of_differing_sizes(tmp_path):
    mixed = [*images(3, (8, 8, 3)), *images(3, (8, 9, 3))]
    write_set(tmp_path, "toy_pictures", {"train": examples(mixed), "test": examples(mixed)})
    expect(tmp_path, r"train.array_record.*, record \d: an image of shape .* differing sizes cannot")


@pytest.mark.parametrize(
    ("features", "example", "message"),
    [
        (
            {"picture": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=2)},
            {"picture": encode_png(images(1, (4, 4, 3))[0]), "label": 1},
            "has no image named 'image'; its features are label, picture",
        ),
        (
            {"image": tfds.features.Image(), "labels": tfds.features.ClassLabel(num_classes=2)},
            {"image": encode_png(images(1, (4, 4, 3))[0]), "labels": 1},
            "has no class label named 'label'; its features are image, labels",
        ),
        (
            {"image": tfds.features.Image(), "label": tfds.features.Text()},
            {"image": encode_png(images(1, (4, 4, 3))[0]), "label": "cat"},
            "has no class label named 'label'",
        ),
        (
            {"image": tfds.features.Text(), "label": tfds.features.ClassLabel(num_classes=2)},
            {"image": "a cat", "label": 1},
            "has no image named 'image'",
        ),
        (
            {
                "image": tfds.features.Image(shape=(4, 4, 1), dtype=np.uint16, encoding_format="png"),
                "label": tfds.features.ClassLabel(num_classes=2),
            },
            {"image": encode_png(images(1, (4, 4, 1))[0]), "label": 1},
            "its images are uint16 with 1 channels; expected uint8",
        ),
    ],
)
def test_sets_of_another_kind(tmp_path, features, example, message):
    write_set(tmp_path, "toy_pictures", {"train": [example], "test": [example]}, features)
    expect(tmp_path, f"^toy_pictures.* {message}" if "has" in message else f"^toy_pictures: {message}")


def test_missing_splits(tmp_path):
    part = examples(images(2, (4, 4, 3)))
    write_set(tmp_path, "toy_pictures", {"train": part, "extra": part})
    expect(tmp_path, "has the splits extra, train; it needs train, and test or validation")
    write_set(tmp_path, "toy_test", {"test": part})
    expect(tmp_path, "has the splits test; it needs train", "toy_test")


def test_unlabelled_test_split(tmp_path):
    part = examples(images(2, (4, 4, 3)))
    write_set(tmp_path, "toy_pictures", {"train": part, "test": [part[0] | {"label": -1}]})
    expect(tmp_path, "test split: labels run from -1 to -1; expected 0 to 1")


# Streaming


def test_streamed_images_are_the_loaded_ones(tmp_path):
    train, test = images(30, (20, 24, 3)), images(8, (20, 24, 3), seed=1)
    write_set(tmp_path, "toy_pictures", {"train": examples(train), "test": examples(test)})
    whole, streamed = load("toy_pictures", tmp_path), open_data("toy_pictures", tmp_path, streaming=True)
    assert streamed.info == whole.info  # all 30 images are among the evenly spaced thousand
    for key in ("train", "test"):
        split, source = getattr(whole, key), getattr(streamed, key)
        assert len(source) == len(split)
        for index in range(len(split)):
            image, label = source[index]
            np.testing.assert_array_equal(image, split.images[index])
            assert label == split.labels[index]


def test_large_sets_are_streamed(tmp_path, monkeypatch):
    splits = {key: examples(images(4, (8, 8, 3))) for key in ("train", "test")}
    write_set(tmp_path, "toy_pictures", splits)
    monkeypatch.setattr(loading, "MOST_RESIDENT_BYTES", 8 * 8 * 8 * 3)
    assert not isinstance(open_data("toy_pictures", tmp_path), StreamedData)
    monkeypatch.setattr(loading, "MOST_RESIDENT_BYTES", 8 * 8 * 8 * 3 - 1)
    assert isinstance(open_data("toy_pictures", tmp_path), StreamedData)
    assert not isinstance(open_data("toy_pictures", tmp_path, streaming=False), StreamedData)


# Names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar1O", "There is no data set 'cifar1O', prepared in .*[.] Did you mean 'cifar10'"),
        ("mnis", "There is no data set 'mnis', prepared in .*[.] Did you mean 'mnist'"),
        (
            "qqqqqq",
            "There is no data set 'qqqqqq', prepared in .*[.] Valid: cifar10, cifar100, fashion_mnist",
        ),
        ("a b", "'a b' is not a name of a data set"),
        ("../sets", "is not a name of a data set"),
        ("huggingface:mnist", "is not a name of a data set"),
        ("mnist:1.1.1", "mnist:1.1.1 cannot be opened"),
        ("mnist", "mnist is not prepared in .*tfds build mnist --file_format=array_record"),
        ("cifar10", "cifar10 is not prepared in .*Run: selconv data prepare cifar10 --from PATH"),
        ("cifar100", "cifar100 is not prepared .*--from PATH .*without --from it is downloaded"),
        ("tiny_imagenet", "tiny_imagenet is not prepared .*--from PATH [^;]*$"),
        ("imagenet2012", "imagenet2012 is not prepared .*--from PATH [^;]*$"),
        ("cifar10:3.0.2", "cifar10:3.0.2 is not prepared in .*Run: selconv data prepare cifar10 --from"),
    ],
)
def test_names_that_cannot_be_loaded(name, message, tmp_path):
    expect(tmp_path / "sets", message, name)
    assert not (tmp_path / "sets").exists()


# Damage


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A prepared tiny CIFAR-10."""
    folder = tmp_path_factory.mktemp("whole")
    archive = tiny_sets.write_archive(folder / "x.tgz", tiny_sets.cifar_binary(CIFAR))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(KNOWN, "cifar10", tiny_sets.entry("cifar10"))
        prepare("cifar10", archive, folder / "sets", lambda *_: None)
    return folder / "sets"


@pytest.fixture
def copy(whole, tmp_path):
    """Its directory ``cifar10/VERSION``, for this test alone."""
    shutil.copytree(whole, tmp_path / "sets")
    return next((tmp_path / "sets" / "cifar10").iterdir())


def flipped(content):
    return content[:2000] + bytes([content[2000] ^ 1]) + content[2001:]


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content[: len(content) // 2],
        flipped,
        lambda content: b"",
        lambda content: b"x" * 70_000,
    ],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_damaged_record_file(copy, split, change):
    path = next(copy.glob(f"cifar10-{split}.array_record*"))
    path.write_bytes(change(path.read_bytes()))
    expect(copy.parent.parent, f"^{path}: damaged or cut short .*Remove its folder and prepare", "cifar10")


def test_missing_record_file(copy):
    path = next(copy.glob("cifar10-test.array_record*"))
    path.unlink()
    expect(copy.parent.parent, f"^{path}: the file is missing", "cifar10")
    with pytest.raises(DataError, match=f"^{path}: the file is missing"):
        open_data("cifar10", copy.parent.parent, streaming=True)


def test_damaged_record_is_named_when_it_is_read(copy):
    path = next(copy.glob("cifar10-train.array_record*"))
    path.write_bytes(flipped(path.read_bytes()))
    with pytest.raises(DataError, match=f"^{copy}, split train, record .*: damaged .*Remove its folder"):
        open_data("cifar10", copy.parent.parent, streaming=True)


@pytest.mark.parametrize("content", [b"\xff\xff\xff", b""])
def test_records_of_something_else(copy, content):
    path = next(copy.glob("cifar10-test.array_record*"))
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for _ in range(tiny_sets.TEST):
        writer.write(content)
    writer.close()
    expect(copy.parent.parent, f"^{path}, record 0: damaged", "cifar10")


def test_damaged_description(copy):
    (copy / "dataset_info.json").write_text("{")
    expect(copy.parent.parent, "cifar10 cannot be opened in .*remove it and prepare", "cifar10")


def test_damaged_features(tmp_path):
    part = examples(images(2, (4, 4, 3)))
    path = Path(write_set(tmp_path, "toy_pictures", {"train": part, "test": part}))
    (path / "features.json").write_text("{")
    expect(tmp_path, "toy_pictures cannot be opened in .*remove it and prepare")


def test_another_number_of_records(copy):
    train, test = (next(copy.glob(f"cifar10-{key}.array_record*")) for key in ("train", "test"))
    shutil.copy(test, train)
    expect(copy.parent.parent, f"^{train}: 20 records, expected 50", "cifar10")


def test_other_file_format(copy):
    path = copy / "dataset_info.json"
    info = json.loads(path.read_text())
    info["fileFormat"] = "tfrecord"
    path.write_text(json.dumps(info))
    expect(copy.parent.parent, f"{copy} holds tfrecord files, which cannot be read without", "cifar10")


def test_undamaged_copy_loads(copy):
    assert len(load("cifar10", copy.parent.parent).test) == tiny_sets.TEST
