"""Splits: the slicing syntax against tensorflow-datasets' own, held-out images against their rule by hand."""

import pickle
import types

import numpy as np
import pytest
import tensorflow_datasets as tfds

from prepared_sets import examples, images, write_set
from selconv_jax.data import load, open_data
from selconv_jax.data._abstract import abstract_data
from selconv_jax.data._dataset import ImageData
from selconv_jax.data._splits import SplitChoice, hold_out, resolve_splits, slices_of
from selconv_jax.errors import DataError

COUNTS = {"train": 53, "test": 20, "validation": 7}
SAMPLE = "fashion_mnist_sample"


# The slicing syntax


@pytest.mark.parametrize(
    "text",
    [
        "train",
        "train[:80%]",
        "train[80%:]",
        "train[5:]",
        "train[-10%:]",
        "train[:-3]",
        "train[10:20]",
        "train[33%:67%]",
        "train[0.5%:99.5%]",
        "validation",
        "train[:10]+validation",
        "test[5:] + train[-3:]",
    ],
)
def test_slices_are_those_of_tensorflow_datasets(text):
    infos = {key: types.SimpleNamespace(num_examples=count) for key, count in COUNTS.items()}
    theirs = tfds.core.splits.AbstractSplit.from_spec(text).to_absolute(infos)
    ours = slices_of("toy", "data.train_split", text, COUNTS)
    assert [(part.split, part.start, part.stop) for part in ours] == [
        (part.splitname, part.from_ or 0, COUNTS[part.splitname] if part.to is None else part.to)
        for part in theirs
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("valid", "there is no split 'valid'. Did you mean 'validation'"),
        ("train[:80%", "'train[:80%' is neither a split nor a slice of one. Write it as .*'train[:80%]'"),
        ("train[7]", "is neither a split nor a slice of one"),
        ("train[]", "is neither a split nor a slice of one"),
        ("train[:]", "is neither a split nor a slice of one"),
        ("train[a:b]", "is neither a split nor a slice of one"),
        ("train[1:2:3]", "is neither a split nor a slice of one"),
        ("train[0.5:]", "is neither a split nor a slice of one"),
        ("train+", "is neither a split nor a slice of one"),
        ("", "is neither a split nor a slice of one"),
        ("train[:60]", "images 0 to 60 of the 53 of train, which has none or not all of them"),
        ("train[53:]", "images 53 to 53 of the 53"),
        ("train[20:10]", "images 20 to 10 of the 53"),
        ("train[-60:]", "images -7 to 53 of the 53"),
        ("train[:200%]", "images 0 to 106 of the 53"),
    ],
)
def test_slices_that_are_refused(text, message):
    pattern = message.replace("[", "\\[")
    with pytest.raises(DataError, match=f"^toy: data.test_split = .*{pattern}"):
        slices_of("toy", "data.test_split", text, COUNTS)


def test_splits_by_default():
    found = resolve_splits("toy", SplitChoice(), COUNTS, ("test", "validation"))
    assert {key: str(*parts) for key, parts in found.items()} == {
        "train": "train[0:53]",
        "test": "test[0:20]",
    }
    found = resolve_splits("toy", SplitChoice(), {"train": 9, "validation": 3}, ("test", "validation"))
    assert str(*found["test"]) == "validation[0:3]"
    with pytest.raises(DataError, match=r"has the splits train; it needs .* or others named by .*test_split"):
        resolve_splits("toy", SplitChoice(), {"train": 9}, ("test", "validation"))
    found = resolve_splits("toy", SplitChoice("train[:6]", "train[6:]"), {"train": 9}, ("test",))
    assert str(*found["test"]) == "train[6:9]"


@pytest.mark.parametrize(
    ("choice", "shared"),
    [
        (SplitChoice(validation="train[-5:]"), r"train\[48:53\]"),
        (SplitChoice(train="train[:40]", test="train[30:]"), r"train\[30:40\]"),
        (SplitChoice(validation="test"), r"test\[0:20\]"),
        (SplitChoice(validation="test[:5]+validation[:2]"), r"test\[0:5\]"),
        (SplitChoice(train="train[:9]+train[5:20]"), r"train\[5:9\]"),
    ],
)
def test_no_image_is_used_twice(choice, shared):
    with pytest.raises(DataError, match=f"^toy: data.*_split = .* share the images {shared}. Choose parts"):
        resolve_splits("toy", choice, COUNTS, ("test",))


# Held-out images


def test_held_out_images_by_hand():
    labels = np.array([0, 0, 1, 0, 1, 0, 1, 1, 0, 0], np.int32)  # places 0 1 3 5 8 9, and 2 4 6 7
    kept, held = hold_out("toy", labels, 4)
    # Of six images those at floor((2 k + 1) 6 / 4) = 1, 4; of four those at 1, 3.
    assert held.tolist() == [1, 4, 7, 8]
    assert kept.tolist() == [0, 2, 3, 5, 6, 9]
    assert [part.tolist() for part in hold_out("toy", labels, 0.4)] == [kept.tolist(), held.tolist()]
    # The class with the most images gives the one that is left over.
    assert np.bincount(labels[hold_out("toy", labels, 5)[1]]).tolist() == [3, 2]


@pytest.mark.parametrize(("number", "count"), [(10, 10), (0.1, 200), (203, 203), (0.3333, 667), (1990, 1990)])
def test_held_out_images_are_balanced(number, count):
    labels = load(SAMPLE).train.labels
    kept, held = hold_out("toy", labels, number)
    assert len(held) == count
    assert np.array_equal(np.union1d(kept, held), np.arange(2000))
    assert len(kept) + len(held) == 2000
    per_class = np.bincount(labels[held], minlength=10)
    assert per_class.max() - per_class.min() == (1 if count % 10 else 0)
    assert np.bincount(labels[kept], minlength=10).min() >= 1


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (2, "data.validation is 2 of 12 training images .*to validate on. Choose 3 images or more"),
        (0.1, "data.validation is 0.1, which is 1 of 12 training images.*Choose 3 images or more"),
        (9, "to train on: the smallest has 3. Choose at most 8 images"),
        (12, "Choose at most 8 images"),
        (5000, "data.validation is 5000 of 12 training images"),
        (0.99, "which is 12 of 12 training images.*Choose at most 8 images"),
    ],
)
def test_a_share_that_leaves_a_class_without_images(number, message):
    labels = np.array([0] * 5 + [1] * 3 + [4] * 4, np.int32)
    with pytest.raises(DataError, match=message):
        hold_out("toy", labels, number)
    kept, _ = hold_out("toy", labels, 8)  # the most it may be
    assert np.bincount(labels[kept]).tolist() == [2, 1, 0, 0, 1]


# Whole sets


def parts(data):
    return {"train": data.train, "test": data.test, "validation": data.validation}


def assert_same(data, other):
    for key, split in parts(data).items():
        source = parts(other)[key]
        assert (split is None) == (source is None)
        if split is not None:
            assert len(split) == len(source)
            for index in range(0, len(split), 7):
                np.testing.assert_array_equal(split[index][0], source[index][0])
                assert split[index][1] == source[index][1]


CHOICES = [
    SplitChoice(held_out=6),
    SplitChoice(train="train[4:]", held_out=0.25),
    SplitChoice(train="train[:50%]", validation="train[-20%:]"),
    SplitChoice(validation="extra", test="test[2:]+train[:2]", train="train[2:]"),
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    sizes = {"train": 40, "test": 9, "extra": 5}
    write_set(
        folder,
        "toy_pictures",
        {key: examples(images(count, (6, 6, 3), seed=count)) for key, count in sizes.items()}
        | {"hidden": [example | {"label": -1} for example in examples(images(3, (6, 6, 3)))]},
    )
    return folder


@pytest.mark.parametrize("choice", CHOICES)
def test_splits_of_a_prepared_set(prepared, choice):
    whole = load("toy_pictures", prepared)
    assert whole.validation is None
    data = load("toy_pictures", prepared, choice)
    assert_same(data, open_data("toy_pictures", prepared, streaming=True, splits=choice))
    names = {"train": "train", "test": "test"}
    extra = tfds.builder_from_directory(next((prepared / "toy_pictures").iterdir()))
    assert extra.info.splits["extra"].num_examples == 5
    for key, text in {"train": choice.train, "test": choice.test, "validation": choice.validation}.items():
        if choice.held_out is not None and key != "test":
            continue
        text = text or names[key]
        expected = [(x["image"], x["label"]) for x in extra.as_data_source(split=text)]
        split = parts(data)[key]
        assert len(split) == len(expected)
        for index, (image, label) in enumerate(expected):
            np.testing.assert_array_equal(split[index][0], image)
            assert split[index][1] == label
    if choice.held_out is not None:
        rows = [split.images.reshape(len(split), -1) for split in (data.train, data.validation)]
        together = np.unique(np.concatenate(rows), axis=0)
        begin = 0 if choice.train is None else 4
        np.testing.assert_array_equal(
            together, np.unique(whole.train.images[begin:].reshape(-1, 108), axis=0)
        )
        assert np.bincount(data.validation.labels).tolist() == {6: [3, 3], 0.25: [5, 4]}[choice.held_out]


@pytest.mark.parametrize("choice", [SplitChoice(held_out=0.1), SplitChoice("train[:500]", "train[500:900]")])
def test_splits_of_the_embedded_sample(choice):
    data, streamed = load(SAMPLE, splits=choice), open_data(SAMPLE, streaming=True, splits=choice)
    assert isinstance(data, ImageData)
    assert_same(data, streamed)
    abstract = abstract_data(SAMPLE, splits=choice)
    assert {key: split and len(split) for key, split in parts(abstract).items()} == {
        key: split and len(split) for key, split in parts(data).items()
    }


@pytest.mark.parametrize("held_out", [60_000, 50_000, 0.000_001])
def test_abstract_sets_refuse_what_leaves_nothing(held_out):
    with pytest.raises(DataError, match=r"cifar10: data.validation is .* of 50000 training images"):
        abstract_data("cifar10", splits=SplitChoice(held_out=held_out))
    assert len(abstract_data("cifar10", splits=SplitChoice(held_out=5000)).train) == 45_000


def test_streamed_parts_go_to_other_processes(prepared):
    data = open_data("toy_pictures", prepared, streaming=True, splits=SplitChoice(held_out=6))
    image, label = pickle.loads(pickle.dumps(data.validation))[2]
    np.testing.assert_array_equal(image, data.validation[2][0])
    assert label == data.validation[2][1]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("key", "split"), [("test", "test"), ("validation", "validation"), ("train", "train")]
)
def test_images_without_labels(prepared, streaming, key, split):
    choice = SplitChoice(**{key: "hidden"})
    message = (
        f"^toy_pictures, {split} split: labels run from -1 to -1; expected 0 to 1. Images without labels .* "
        "data.test_split .* data.validation"
    )
    with pytest.raises(DataError, match=message):
        open_data("toy_pictures", prepared, streaming, choice)
