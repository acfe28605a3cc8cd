"""Small data sets in the original formats of the whole ones, and catalog entries to match."""

import dataclasses
import gzip
import io
import json
import pickle
import struct
import tarfile

import numpy as np
from PIL import Image

from selconv_jax.data.catalog import KNOWN
from selconv_jax.data.dataset import Split

TRAIN, TEST = 50, 20  # images in all; a tenth of each class


def splits(height, width, channels, seed=0):
    """Random images with balanced labels, by split."""
    generator = np.random.default_rng(seed)
    return {
        key: Split(
            generator.integers(0, 256, (count, height, width, channels), dtype=np.uint8),
            generator.permutation(np.arange(count, dtype=np.int32) % 10),
        )
        for key, count in (("train", TRAIN), ("test", TEST))
    }


def entry(name, **changes):
    """The catalog's entry of a whole set, with the counts of the tiny one and no checksums."""
    tiny = {"counts": {"train": TRAIN, "test": TEST}, "digests": {}, "places": ()}
    return dataclasses.replace(KNOWN[name], **(tiny | changes))


# Fashion-MNIST


def idx_contents(data):
    """The four unpacked idx files by name."""
    contents = {}
    for key, stem in (("train", "train"), ("test", "t10k")):
        for kind, array in (
            ("images-idx3", data[key].images[..., 0]),
            ("labels-idx1", data[key].labels.astype(np.uint8)),
        ):
            header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            contents[f"{stem}-{kind}-ubyte"] = header + array.tobytes()
    return contents


def write_idx(folder, data, packed=True):
    """A folder with the four files; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in idx_contents(data).items():
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return folder


# CIFAR-10


def batches(data):
    """Images uint8 [n, 32, 32, 3] and labels [n] of the six batches by name."""
    images = [*np.split(data["train"].images, 5), data["test"].images]
    labels = [*np.split(data["train"].labels, 5), data["test"].labels]
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    return {name: pair for name, *pair in zip(names, images, labels, strict=True)}


def planes(images):
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def cifar_binary(data):
    return {
        f"cifar-10-batches-bin/{name}.bin": np.concatenate(
            [labels[:, None].astype(np.uint8), planes(images)], axis=1
        ).tobytes()
        for name, (images, labels) in batches(data).items()
    }


def cifar_python(data, protocol=2):
    return {
        f"cifar-10-batches-py/{name}": pickle.dumps(
            {b"labels": labels.tolist(), b"data": planes(images), b"batch_label": b"a batch"},
            protocol=protocol,
        )
        for name, (images, labels) in batches(data).items()
    }


def cifar_npm(data):
    contents = {
        "package/train_lables.json": json.dumps(data["train"].labels.tolist()).encode(),
        "package/test_lables.json": json.dumps(data["test"].labels.tolist()).encode(),
    }
    for name, (images, _) in batches(data).items():
        contents[f"package/{name}.png"] = png_file(images.reshape(len(images), 1024, 3))
    return contents


def png_file(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return buffer.getvalue()


CIFAR_FORMS = {"binary": cifar_binary, "python": cifar_python, "npm": cifar_npm}


def write_archive(path, contents):
    """A .tar.gz with the given files; returns it."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_folder(folder, contents):
    """The given files below a folder; returns it."""
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder
