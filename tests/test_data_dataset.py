"""What a data set in memory must be, the embedded sample, the catalog and its status."""

import dataclasses
import hashlib
import importlib.resources
import json
import subprocess
import sys

import numpy as np
import pytest

from selconv_jax.data import DatasetInfo, ImageData, Split, load
from selconv_jax.data._catalog import (
    KNOWN,
    SAMPLE,
    prepare_command,
    prepared_directories,
    resolve_data_dir,
    status,
)
from selconv_jax.errors import DataError

DIGEST = "965d0969e3740fd1e053a270bc9cf6b7da058dfc790f0417c0453ed10be58633"
INFO = DatasetInfo("toy", (4, 5, 1), 3, ("a", "b", "c"), (0.5,), (0.25,), 1, True)


def split(count=6, shape=(4, 5, 1), dtype=np.uint8, labels=None, label_dtype=np.int32):
    labels = np.arange(count) % 3 if labels is None else labels
    return Split(np.zeros((count, *shape), dtype), np.asarray(labels, label_dtype))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_shape": (4, 5)}, r"image_shape is \(4, 5\)"),
        ({"image_shape": (0, 5, 1)}, r"image_shape is \(0, 5, 1\)"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"class_names": ("a",)}, "1 class_names for 3 classes"),
        ({"mean": (0.1, 0.2)}, "mean has 2 values for 1 channels"),
        ({"std": ()}, "std has 0 values for 1 channels"),
        ({"std": (0.0,)}, "std is"),
        ({"std": (float("nan"),)}, "std is"),
        ({"image_shape": (4, 5, 2), "mean": (0.5, 0.5), "std": (0.5, float("nan"))}, "std is"),
        ({"crop_padding": -1}, "crop_padding is -1"),
        ({"eval_resize": 4}, r"eval_resize is 4, less than the image_shape \(4, 5, 1\)"),
    ],
)
def test_contradictory_facts_are_errors(change, message):
    with pytest.raises(DataError, match=f"^toy: {message}"):
        dataclasses.replace(INFO, **change)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": np.float32}, r"images are float32\[6, 4, 5, 1\]"),
        ({"shape": (4, 5)}, r"images are uint8\[6, 4, 5\]"),
        ({"label_dtype": np.int64}, "labels are int64"),
        ({"labels": [0, 1]}, r"labels are int32\[2\] for 6 images"),
    ],
)
def test_split_of_another_form_is_an_error(arguments, message):
    with pytest.raises(DataError, match=message):
        split(**arguments)


@pytest.mark.parametrize(
    ("test", "message"),
    [
        ({"count": 0}, "there are no images"),
        ({"shape": (5, 4, 1)}, r"images are \(5, 4, 1\); expected \(4, 5, 1\)"),
        ({"labels": [0, 1, 2, 3, 0, 1]}, "labels run from 0 to 3; expected 0 to 2"),
        ({"labels": [0, 1, 2, -1, 0, 1]}, "labels run from -1 to 2"),
    ],
)
def test_splits_must_fit_the_facts(test, message):
    assert len(ImageData(INFO, split(), split()).train) == 6
    with pytest.raises(DataError, match=f"toy, test split: {message}"):
        ImageData(INFO, split(), split(**test))


def test_sample_content():
    data = load(SAMPLE)
    assert data.info.class_names[9] == "Ankle boot"
    assert (data.info.mean, data.info.std) == ((0.1307,), (0.3081,))
    assert (data.info.crop_padding, data.info.flip) == (4, True)
    for part, per_class in ((data.train, 200), (data.test, 100)):
        assert part.images.shape == (10 * per_class, 28, 28, 1)
        assert np.bincount(part.labels).tolist() == [per_class] * 10
    # The whole training set starts with these labels; all of them belong to the sample.
    assert data.train.labels[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]
    digest = hashlib.sha256()
    for array in (data.train.images, data.train.labels, data.test.images, data.test.labels):
        digest.update(array.tobytes())
    assert digest.hexdigest() == DIGEST


def test_licence_comes_with_the_sample():
    text = (importlib.resources.files("selconv_jax.data") / "FASHION_MNIST_LICENSE.txt").read_text()
    assert "MIT License" in text
    assert "2017 Zalando SE" in text


def test_sample_needs_no_tensorflow_datasets():
    code = (
        "import sys; from selconv_jax.data import load; load('fashion_mnist_sample');"
        "sys.exit('tensorflow_datasets' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_catalog_is_consistent():
    for name, known in KNOWN.items():
        assert known.name == name
        assert known.info().num_classes == known.num_classes
        assert all(count % known.num_classes == 0 for count in known.counts.values()) == known.balanced
        assert all(len(item.sha256) == 64 for item in known.downloads)
        assert all(len(digest) == 64 for digest in known.digests.values())
    assert len(KNOWN["fashion_mnist"].digests) == 4
    assert len(KNOWN["cifar10"].digests) == 6
    assert KNOWN["cifar100"].class_names[99] == "worm"
    assert KNOWN["cifar100"].mean == (0.5071, 0.4867, 0.4408)
    assert (KNOWN["tiny_imagenet"].crop_padding, KNOWN["imagenet2012"].eval_resize) == (8, 256)


def test_default_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert resolve_data_dir(None) == tmp_path
    assert prepare_command("cifar10", tmp_path) == "selconv data prepare cifar10 --from PATH"
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_data_dir(None) == tmp_path / "tensorflow_datasets"
    assert prepare_command("cifar10", tmp_path / "my sets").endswith(f" --data-dir '{tmp_path}/my sets'")


def make_prepared(folder, splits=(("train", ["3", "4"]), ("test", ["2"]))):
    folder.mkdir(parents=True)
    info = {"splits": [{"name": name, "shardLengths": lengths} for name, lengths in splits]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (folder / "features.json").write_text("{}")


def test_status(tmp_path):
    make_prepared(tmp_path / "cifar10" / "3.0.2")
    make_prepared(tmp_path / "toy" / "small" / "1.9.0")
    make_prepared(tmp_path / "toy" / "small" / "1.10.0")
    make_prepared(tmp_path / ".preparing-x" / "mnist" / "3.0.1")
    (tmp_path / "half" / "1.0.0").mkdir(parents=True)
    (tmp_path / "half" / "1.0.0" / "dataset_info.json").write_text("{}")
    rows = {row.name: row for row in status(tmp_path)}
    assert {name: row.state for name, row in rows.items()} == {
        "fashion_mnist_sample": "included",
        "fashion_mnist": "not prepared",
        "cifar10": "prepared",
        "cifar100": "not prepared",
        "tiny_imagenet": "not prepared",
        "imagenet2012": "not prepared",
        "toy/small": "prepared",
    }
    assert rows["cifar10"].path == tmp_path / "cifar10" / "3.0.2"
    assert rows["cifar10"].image_shape == (32, 32, 3)
    assert rows["toy/small"].path == tmp_path / "toy" / "small" / "1.10.0"
    assert rows["toy/small"].counts == {"train": 7, "test": 2}
    assert prepared_directories(tmp_path / "nowhere") == {}


def test_status_of_a_damaged_description(tmp_path):
    make_prepared(tmp_path / "toy" / "1.0.0")
    (tmp_path / "toy" / "1.0.0" / "dataset_info.json").write_text("{")
    assert status(tmp_path)[-1].counts == {}
