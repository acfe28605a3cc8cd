"""Load a data set by name into memory."""

import os
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selconv_jax.data.catalog import KNOWN, SAMPLE, resolve_data_dir
from selconv_jax.data.dataset import DatasetInfo, ImageData
from selconv_jax.data.records import open_prepared, read_split
from selconv_jax.data.sample import load_sample
from selconv_jax.errors import DataError

__all__ = ["load"]


def load(name: str, data_dir: str | os.PathLike[str] | None = None) -> ImageData:
    """Load the embedded sample, or a set that has been prepared; nothing is downloaded.

    Besides the sets of the catalog, any image classification set of tensorflow-datasets loads that
    is prepared as array_record files, has features ``image`` (uint8, all of one size) and ``label``
    and splits ``train`` and ``test`` (or, without that, ``validation``). Its mean and standard
    deviation are computed from its training images, its crops are padded by an eighth of the
    height, and its images are flipped.

    Args:
        name: ``fashion_mnist_sample``, ``fashion_mnist``, ``cifar10``, or the name of another set
            of tensorflow-datasets: ``name`` or ``name/config``, either followed by ``:version``.
        data_dir: The directory of the prepared sets; by default that of tensorflow-datasets.

    Returns:
        The set in memory, images uint8 ``[N, H, W, C]``, labels int32 ``[N]``.

    Raises:
        DataError: If there is no such set, it is not prepared, one of its files is damaged, or its
            images cannot be used. The message says what to do.

    Example:
        >>> load("fashion_mnist_sample").train.images.shape
        (2000, 28, 28, 1)
    """
    if name == SAMPLE:
        return load_sample()
    builder = open_prepared(name, resolve_data_dir(data_dir))
    _check_features(name, builder.info.features)
    test = next((key for key in ("test", "validation") if key in builder.info.splits), None)
    if "train" not in builder.info.splits or test is None:
        raise DataError(
            f"{name} has the splits {', '.join(sorted(builder.info.splits)) or 'none'}; "
            "it needs train, and test or validation."
        )
    train_split, test_split = read_split(builder, "train"), read_split(builder, test)
    known = KNOWN.get(re.split("[/:]", name)[0])
    if known is not None:
        return ImageData(known.info(), train_split, test_split)
    mean, std = _moments(train_split.images)
    label = builder.info.features["label"]
    height, width, channels = train_split.images.shape[1:]
    info = DatasetInfo(
        name=name,
        image_shape=(height, width, channels),
        num_classes=label.num_classes,
        class_names=tuple(label.names),
        mean=mean,
        std=std,
        crop_padding=round(height / 8),
        flip=True,
    )
    return ImageData(info, train_split, test_split)


def _check_features(name: str, features: Any) -> None:
    """Refuse what is not an image classification set."""
    import tensorflow_datasets as tfds

    keys = sorted(features) if isinstance(features, tfds.features.FeaturesDict) else []
    if "image" not in keys or not isinstance(features["image"], tfds.features.Image):
        raise DataError(f"{name} has no image named 'image'; its features are {', '.join(keys)}.")
    dtype, channels = np.dtype(features["image"].np_dtype), features["image"].shape[-1]
    if dtype != np.uint8 or channels not in (None, 1, 3, 4):
        raise DataError(
            f"{name}: its images are {dtype} with {channels} channels; expected uint8 with 1, 3 or 4."
        )
    if "label" not in keys or not getattr(features["label"], "num_classes", None):
        raise DataError(f"{name} has no class label named 'label'; its features are {', '.join(keys)}.")


def _moments(images: NDArray[np.uint8]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel as fractions of 255, exactly, by counting."""
    levels = np.arange(256) / 255
    means, deviations = [], []
    for channel in range(images.shape[3]):
        counts = np.bincount(images[..., channel].reshape(-1), minlength=256)
        mean = np.average(levels, weights=counts)
        means.append(float(mean))
        deviations.append(float(np.sqrt(np.average((levels - mean) ** 2, weights=counts))))
    return tuple(means), tuple(deviations)
