"""Small data sets in the original formats of the whole ones, and catalog entries to match."""

import dataclasses
import gzip
import io
import json
import pickle
import struct
import tarfile
import zipfile

import numpy as np
from PIL import Image

from selconv_jax.data._catalog import KNOWN
from selconv_jax.data._dataset import Split

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


# CIFAR-100: five classes, of which three lie in superclass 0 and two in 1

COARSE = np.array([0, 0, 1, 0, 1])


def cifar100_splits(seed=0):
    """Random images with balanced labels in 0..4, by split."""
    data = splits(32, 32, 3, seed)
    return {key: Split(split.images, split.labels % 5) for key, split in data.items()}


def cifar100_binary(data):
    contents = {}
    for key, split in data.items():
        columns = [COARSE[split.labels], split.labels]
        labels = np.stack(columns, axis=1).astype(np.uint8)
        contents[f"cifar-100-binary/{key}.bin"] = np.concatenate([labels, planes(split.images)], 1).tobytes()
    return contents


def cifar100_python(data):
    return {
        f"cifar-100-python/{key}": pickle.dumps(
            {
                b"data": planes(split.images),
                b"fine_labels": split.labels.tolist(),
                b"coarse_labels": COARSE[split.labels].tolist(),
            },
            protocol=2,
        )
        for key, split in data.items()
    }


# Image files


def jpeg(seed, mode="RGB", size=(64, 64)):
    """A JPEG file of smooth noise, (height, width)."""
    channels = len(mode) if mode != "L" else 1
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, channels), dtype=np.uint8)
    image = Image.fromarray(coarse[..., 0] if channels == 1 else coarse, mode).resize(size[::-1])
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", quality=90)
    return buffer.getvalue()


# Tiny-ImageNet: three classes, listed out of order as in the original

WNIDS = ("n03", "n01", "n02")


def tiny_imagenet_files(train=3, validation=2):
    """The unpacked files by path."""
    files = {"wnids.txt": "\n".join(WNIDS).encode() + b"\n"}
    lines = []
    for number, wnid in enumerate(WNIDS):
        for index in range(train):
            files[f"train/{wnid}/images/{wnid}_{index}.JPEG"] = jpeg((number, index))
        for index in range(validation):
            name = f"val_{number + index * len(WNIDS)}.JPEG"
            files[f"val/images/{name}"] = jpeg((number, index, 1))
            lines.append(f"{name}\t{wnid}\t0\t32\t44\t62")
    files["val/val_annotations.txt"] = "\n".join(lines).encode() + b"\n"
    files["test/images/test_0.JPEG"] = jpeg(99)
    return files


def write_zip(path, contents, folder="tiny-imagenet-200/"):
    """A zip archive with the given files; returns it."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(folder + name, content)
    return path


# ImageNet: images of two of the thousand classes, validation images with their published labels

IMAGENET_WNIDS = ("n01440764", "n15075141")


def imagenet_train():
    """Training images by class and file name, of differing sizes."""
    return {
        wnid: {
            f"{wnid}_{index}.JPEG": jpeg((number, index), size=(40 + 8 * index, 70 - 8 * index))
            for index in range(4)
        }
        for number, wnid in enumerate(IMAGENET_WNIDS)
    }


def imagenet_validation():
    """Validation images by file name."""
    return {f"ILSVRC2012_val_{number:08}.JPEG": jpeg(number, size=(50, 90)) for number in range(1, 6)}


def tar_bytes(contents):
    buffer = io.BytesIO()
    write_archive(None, contents, mode="w", fileobj=buffer)
    return buffer.getvalue()


def write_imagenet(folder, train=None, validation=None):
    """A folder with both archives; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    classes = imagenet_train() if train is None else train
    inner = {f"{wnid}.tar": tar_bytes(files) for wnid, files in classes.items()}
    write_archive(folder / "ILSVRC2012_img_train.tar", inner, mode="w")
    files = imagenet_validation() if validation is None else validation
    write_archive(folder / "ILSVRC2012_img_val.tar", files, mode="w")
    return folder


def write_archive(path, contents, mode="w:gz", fileobj=None):
    """A .tar.gz (or another archive) with the given files; returns it."""
    with tarfile.open(path, mode, fileobj=fileobj) as archive:
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
