"""CIFAR-100: both archives give the same arrays and the set that the stock builder would write."""

import dataclasses

import numpy as np
import pytest
import tensorflow_datasets as tfds

import tiny_sets
from selconv_jax.data import Split, load
from selconv_jax.data._catalog import KNOWN
from selconv_jax.data._preparation.cifar import COARSE_CLASSES, decode_cifar, read_cifar
from selconv_jax.data._preparation.originals import verify
from selconv_jax.data._preparation.prepare import prepare
from selconv_jax.errors import DataError

DATA = tiny_sets.cifar100_splits()
FORMS = {"binary": tiny_sets.cifar100_binary, "python": tiny_sets.cifar100_python}
FIVE = tiny_sets.entry("cifar100", num_classes=5, class_names=("a", "b", "c", "d", "e"))


def read(source):
    parts = read_cifar(FIVE, source)
    splits, coarse = decode_cifar(FIVE, parts)
    verify(FIVE, parts, splits)
    return splits, coarse


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("packed", [True, False])
def test_every_form_gives_the_same(tmp_path, form, packed):
    contents = FORMS[form](DATA)
    source = (
        tiny_sets.write_archive(tmp_path / "x.tar.gz", contents)
        if packed
        else tiny_sets.write_folder(tmp_path / "x", contents)
    )
    splits, coarse = read(source)
    for key, split in DATA.items():
        np.testing.assert_array_equal(splits[key].images, split.images)
        np.testing.assert_array_equal(splits[key].labels, split.labels)
        np.testing.assert_array_equal(coarse[key], tiny_sets.COARSE[split.labels])


def without(contents, name):
    return {key: value for key, value in contents.items() if not key.endswith(name)}


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({}, "neither an archive of CIFAR-100 nor the folder"),
        (without(tiny_sets.cifar100_binary(DATA), "test.bin"), "test.bin is missing"),
        (without(tiny_sets.cifar100_python(DATA), "train"), "train is missing"),
        ({**tiny_sets.cifar100_binary(DATA), "test.bin": b"x" * 3075}, "3075 bytes are not a whole number"),
        ({**tiny_sets.cifar100_binary(DATA), "test.bin": b"\x14" * 3074}, "superclasses are not 0 to 19"),
        ({**tiny_sets.cifar100_python(DATA), "test": b"x"}, "not a batch of cifar-100-python.tar.gz"),
    ],
)
def test_damage_is_named(tmp_path, contents, message):
    source = tiny_sets.write_archive(tmp_path / "x.tar.gz", contents)
    with pytest.raises(DataError, match=message):
        read(source)


def test_a_class_in_two_superclasses(tmp_path):
    contents = tiny_sets.cifar100_binary(DATA)
    changed = bytearray(contents["cifar-100-binary/test.bin"])
    changed[0] ^= 1
    contents["cifar-100-binary/test.bin"] = bytes(changed)
    with pytest.raises(DataError, match="one for each class"):
        read(tiny_sets.write_archive(tmp_path / "x.tar.gz", contents))


def test_counts_are_verified(tmp_path):
    data = {**DATA, "test": Split(DATA["test"].images[:10], DATA["test"].labels[:10])}
    with pytest.raises(DataError, match="test split: 10 images"):
        read(tiny_sets.write_archive(tmp_path / "x.tar.gz", tiny_sets.cifar100_binary(data)))


def test_prepared_set_is_that_of_the_stock_builder(tmp_path, monkeypatch):
    """All hundred classes, as the stock features demand: one image of each."""
    generator = np.random.default_rng(1)
    labels = np.arange(100, dtype=np.int32)
    images = generator.integers(0, 256, (100, 32, 32, 3), dtype=np.uint8)
    data = {key: Split(images, labels) for key in ("train", "test")}
    monkeypatch.setattr(tiny_sets, "COARSE", labels % 20)
    entry = dataclasses.replace(KNOWN["cifar100"], counts={"train": 100, "test": 100})
    monkeypatch.setitem(KNOWN, "cifar100", entry)
    source = tiny_sets.write_archive(tmp_path / "x.tar.gz", tiny_sets.cifar100_python(data))
    prepare("cifar100", source, tmp_path / "sets", lambda *_: None)
    written, stock = (tfds.builder("cifar100", data_dir=tmp_path / name).info for name in ("sets", "none"))
    assert written.features.to_json() == stock.features.to_json()
    assert written.features["label"].names[:2] == ["apple", "aquarium_fish"]
    assert written.features["coarse_label"].names == list(COARSE_CLASSES)
    for example in tfds.data_source("cifar100", split="test", data_dir=tmp_path / "sets"):
        place = int(example["id"].decode().removeprefix("test_"))
        np.testing.assert_array_equal(example["image"], images[place])
        assert (example["label"], example["coarse_label"]) == (place, place % 20)
    assert sorted(load("cifar100", tmp_path / "sets").train.labels) == list(range(100))
