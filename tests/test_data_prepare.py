"""Preparing: the written set equals the original files, and a failure leaves nothing behind."""

import json

import numpy as np
import pytest
import tensorflow_datasets as tfds

import tiny_sets
from selconv_jax._utils.console import console_progress
from selconv_jax.data import load
from selconv_jax.data._catalog import KNOWN
from selconv_jax.data._preparation import prepare, writing
from selconv_jax.data._preparation.prepare import prepare as prepare_set
from selconv_jax.errors import DataError

DATA = {"fashion_mnist": tiny_sets.splits(28, 28, 1), "cifar10": tiny_sets.splits(32, 32, 3)}


def silent(task, done, total):
    pass


@pytest.fixture(autouse=True)
def _tiny_catalog(monkeypatch):
    for name in DATA:
        monkeypatch.setitem(KNOWN, name, tiny_sets.entry(name))


@pytest.fixture
def sources(tmp_path):
    return {
        "fashion_mnist": tiny_sets.write_idx(tmp_path / "idx", DATA["fashion_mnist"]),
        "cifar10": tiny_sets.write_archive(
            tmp_path / "cifar.tar.gz", tiny_sets.cifar_binary(DATA["cifar10"])
        ),
    }


@pytest.fixture
def data_dir(tmp_path):
    return tmp_path / "sets"


def everything(folder):
    """Each file below a folder with its content."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def order_of(loaded, original):
    """For each loaded image, its place in the original split; labels must agree."""
    places = {image.tobytes(): place for place, image in enumerate(original.images)}
    order = [places[image.tobytes()] for image in loaded.images]
    np.testing.assert_array_equal(original.labels[order], loaded.labels)
    return order


@pytest.mark.parametrize("name", DATA)
def test_prepared_set_holds_the_original_images(name, sources, data_dir):
    path = prepare_set(name, sources[name], data_dir, silent)
    assert path.parent == data_dir / name
    data = load(name, data_dir)
    assert data.info == KNOWN[name].info()
    for key in ("train", "test"):
        order = order_of(getattr(data, key), DATA[name][key])
        assert sorted(order) == list(range(len(DATA[name][key])))
    assert [path.name for path in data_dir.iterdir()] == [name]


@pytest.mark.parametrize("name", DATA)
def test_plain_tensorflow_datasets_reads_it(name, sources, data_dir):
    prepare_set(name, sources[name], data_dir, silent)
    data = load(name, data_dir)
    for key in ("train", "test"):
        source = tfds.data_source(name, split=key, data_dir=data_dir)
        assert len(source) == len(DATA[name][key])
        for index, example in enumerate(source):
            np.testing.assert_array_equal(example["image"], getattr(data, key).images[index])
            assert example["label"] == getattr(data, key).labels[index]
            if name == "cifar10":
                place = int(example["id"].decode().removeprefix(f"{key}_"))
                np.testing.assert_array_equal(example["image"], DATA[name][key].images[place])
    assert len(tfds.data_source(name, split="train[:20%]", data_dir=data_dir)) == 10


@pytest.mark.parametrize("name", DATA)
def test_description_is_that_of_the_stock_builder(name, sources, data_dir):
    prepare_set(name, sources[name], data_dir, silent)
    written, stock = (tfds.builder(name, data_dir=path).info for path in (data_dir, data_dir / "none"))
    assert written.features.to_json() == stock.features.to_json()
    assert written.features["label"].names == list(KNOWN[name].class_names)
    assert (written.version, written.description, written.citation) == (
        stock.version,
        stock.description,
        stock.citation,
    )


def test_preparing_again_does_nothing(sources, data_dir):
    path = prepare_set("cifar10", sources["cifar10"], data_dir, silent)
    before = {file: file.stat().st_mtime_ns for file in path.iterdir()}
    calls = []
    assert prepare_set("cifar10", "/nowhere", data_dir, lambda *call: calls.append(call)) == path
    assert calls == [(f"cifar10 is already prepared in {path}", 1, 1)]
    assert {file: file.stat().st_mtime_ns for file in path.iterdir()} == before


def test_installed_package_is_found_without_a_source(sources, data_dir, monkeypatch):
    monkeypatch.setitem(
        KNOWN, "fashion_mnist", tiny_sets.entry("fashion_mnist", places=(sources["fashion_mnist"],))
    )
    prepare_set("fashion_mnist", None, data_dir, silent)
    assert len(load("fashion_mnist", data_dir).train) == tiny_sets.TRAIN


def test_progress(sources, data_dir, capsys):
    calls = []
    prepare_set("cifar10", sources["cifar10"], data_dir, lambda *call: calls.append(call))
    assert calls == [
        (f"Reading cifar10 from {sources['cifar10']}", 0, 1),
        (f"Reading cifar10 from {sources['cifar10']}", 1, 1),
        ("Writing train images of cifar10", 50, 50),
        ("Writing test images of cifar10", 20, 20),
    ]
    assert capsys.readouterr() == ("", "")  # nothing but what the caller's progress does


def test_plain_lines_where_there_is_no_terminal(sources, data_dir, capsys):
    prepare_set("fashion_mnist", sources["fashion_mnist"], data_dir)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        f"Reading fashion_mnist from {sources['fashion_mnist']}",
        "Writing train images of fashion_mnist: 50",
        "Writing test images of fashion_mnist: 20",
    ]


def test_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with console_progress() as progress:
        for done in (0, 1, 2):
            progress("Counting [two]", done, 2)
    assert "Counting [two]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (OSError(28, "No space left on device"), DataError),
        (RuntimeError("disk quota exceeded"), DataError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_failure_while_writing_leaves_nothing(sources, data_dir, monkeypatch, fault, expected):
    prepare_set("fashion_mnist", sources["fashion_mnist"], data_dir, silent)
    before = everything(data_dir)
    encode, images = writing.encode_png, []

    def failing(image):
        images.append(image)
        if len(images) == 60:  # in the second split
            raise fault
        return encode(image)

    monkeypatch.setattr(writing, "encode_png", failing)
    with pytest.raises(expected) as caught:
        prepare_set("cifar10", sources["cifar10"], data_dir, silent)
    if expected is DataError:
        assert f"{data_dir}: writing cifar10 failed" in str(caught.value)
    assert everything(data_dir) == before
    assert [path.name for path in data_dir.iterdir()] == ["fashion_mnist"]
    monkeypatch.setattr(writing, "encode_png", encode)
    prepare_set("cifar10", sources["cifar10"], data_dir, silent)
    assert len(load("cifar10", data_dir).train) == tiny_sets.TRAIN


def test_failure_while_reading_makes_no_directory(sources, data_dir):
    content = sources["cifar10"].read_bytes()
    sources["cifar10"].write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"cifar\.tar\.gz: damaged"):
        prepare_set("cifar10", sources["cifar10"], data_dir, silent)
    assert not data_dir.exists()


def test_what_is_in_the_way_stays(sources, data_dir):
    path = prepare_set("cifar10", sources["cifar10"], data_dir, silent)
    (path / "features.json").unlink()  # no longer a prepared set
    before = everything(data_dir)
    with pytest.raises(DataError, match=f"remove what is in the way under {data_dir}/cifar10"):
        prepare_set("cifar10", sources["cifar10"], data_dir, silent)
    assert everything(data_dir) == before


def test_empty_folder_is_not_in_the_way(sources, data_dir):
    path = prepare_set("cifar10", sources["cifar10"], data_dir / "a", silent)
    empty = data_dir / "b" / path.relative_to(data_dir / "a")
    empty.mkdir(parents=True)
    assert prepare_set("cifar10", sources["cifar10"], data_dir / "b", silent) == empty
    assert json.loads((empty / "dataset_info.json").read_text())["fileFormat"] == "array_record"


def test_directory_that_cannot_be_written(sources, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/sets: cannot be written .*Choose another directory"):
        prepare_set("cifar10", sources["cifar10"], tmp_path / "file" / "sets", silent)


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("cifar", None, "There is no data set 'cifar' to prepare. Did you mean 'cifar10'"),
        ("fashion_mnist_sample", None, "comes with this package and needs no preparation"),
        ("cifar10", "/nowhere/at/all", "/nowhere/at/all: there is no such file or folder. Give --from"),
    ],
)
def test_wrong_arguments(name, source, message, data_dir):
    with pytest.raises(DataError, match=message):
        prepare_set(name, source, data_dir, silent)
    assert not data_dir.exists()


def test_module_and_function_share_a_name_without_clashing():
    assert prepare.prepare is prepare_set
