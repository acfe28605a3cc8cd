"""Load a data set by name into memory, or open it for streaming."""

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selconv_jax.data.catalog import SAMPLE, find_known, resolve_data_dir
from selconv_jax.data.dataset import DatasetInfo, ImageData
from selconv_jax.data.records import PreparedImages, open_prepared, read_split
from selconv_jax.data.sample import load_sample
from selconv_jax.data.stream import StreamedData
from selconv_jax.errors import DataError

__all__ = ["MOST_RESIDENT_BYTES", "load", "open_data"]

MOST_RESIDENT_BYTES = 2 * 2**30
"""Of a set that is kept on the devices unless told otherwise."""

_SAMPLED = 1000


def load(name: str, data_dir: str | os.PathLike[str] | None = None) -> ImageData:
    """Load the embedded sample, or a set that has been prepared; nothing is downloaded.

    Besides the sets of the catalog, any image classification set of tensorflow-datasets loads that
    is prepared as array_record files, has features ``image`` (uint8, all of one size) and ``label``
    and splits ``train`` and ``test`` (or, without that, ``validation``). Its mean and standard
    deviation are computed from its training images (the deviation of a channel of one value is taken
    to be 1), its crops are padded by an eighth of the height, and its images are flipped.

    Args:
        name: A set of the catalog, or the name of another set of tensorflow-datasets: ``name`` or
            ``name/config``, either followed by ``:version``.
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
    data = open_data(name, data_dir, streaming=False)
    assert isinstance(data, ImageData)
    return data


def open_data(
    name: str, data_dir: str | os.PathLike[str] | None = None, streaming: bool | None = None
) -> ImageData | StreamedData:
    """Load a set as :func:`load` does, or open it to be read while it is used.

    A streamed set outside the catalog has its mean and standard deviation computed from a thousand
    of its training images, evenly spaced.

    Args:
        name: As for :func:`load`.
        data_dir: As for :func:`load`.
        streaming: Whether to stream; ``None``: a set whose images differ in size, and one that would
            take more than 2 GiB.

    Returns:
        The set, in memory or to be streamed.

    Raises:
        DataError: As for :func:`load`, or if a set can only be streamed and must not.

    Example:
        >>> len(open_data("fashion_mnist_sample", streaming=True).train)
        2000
    """
    if name == SAMPLE:
        data = load_sample()
        return StreamedData(data.info, data.train, data.test) if streaming else data
    builder = open_prepared(name, resolve_data_dir(data_dir))
    _check_features(name, builder.info.features)
    known = find_known(name)
    # The test split of a known set may be one without labels.
    wanted = ("test", "validation") if known is None else tuple(set(known.counts) - {"train"})
    test = next((key for key in wanted if key in builder.info.splits), None)
    if "train" not in builder.info.splits or test is None:
        raise DataError(
            f"{name} has the splits {', '.join(sorted(builder.info.splits)) or 'none'}; "
            f"it needs train, and {' or '.join(wanted)}."
        )
    label = builder.info.features["label"]
    info = None if known is None else known.info(tuple(label.names))
    differing = info is not None and info.eval_resize is not None
    if differing and streaming is False:
        raise DataError(
            f"The images of {name} differ in size, so that it can only be streamed: leave out "
            "data.streaming, or set it to true."
        )
    if streaming is None:
        streaming = differing or _size(builder, ("train", test)) > MOST_RESIDENT_BYTES
    if streaming:
        train_images, test_images = PreparedImages(builder, "train"), PreparedImages(builder, test)
        if info is None:
            places = np.linspace(0, len(train_images) - 1, min(_SAMPLED, len(train_images)), dtype=int)
            info = _info(name, label, [train_images[int(place)][0] for place in places])
        return StreamedData(info, train_images, test_images)
    train_split, test_split = read_split(builder, "train"), read_split(builder, test)
    return ImageData(info or _info(name, label, [train_split.images]), train_split, test_split)


def _info(name: str, label: Any, images: Sequence[NDArray[np.uint8]]) -> DatasetInfo:
    """The facts of a set that the catalog does not know, from training images ``[..., H, W, C]``."""
    height, width, channels = images[0].shape[-3:]
    mean, std = _moments(images, channels)
    return DatasetInfo(
        name=name,
        image_shape=(height, width, channels),
        num_classes=label.num_classes,
        class_names=tuple(label.names),
        mean=mean,
        std=std,
        crop_padding=round(height / 8),
        flip=True,
    )


def _size(builder: Any, splits: Sequence[str]) -> int:
    """Bytes that all images would take, if they are like the first one."""
    counts = [builder.info.splits[key].num_examples for key in splits]
    shape = builder.info.features["image"].shape
    if None in shape and counts[0]:
        shape = PreparedImages(builder, splits[0])[0][0].shape
    return sum(counts) * math.prod(side or 0 for side in shape)


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


def _moments(
    images: Sequence[NDArray[np.uint8]], channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel as fractions of 255, exactly, by counting.

    A channel of one value, such as opaque alpha, has the deviation 1: normalized, it is 0.
    """
    levels = np.arange(256) / 255
    means, deviations = [], []
    for channel in range(channels):
        counts = np.zeros(256, np.int64)
        for pixels in images:
            counts += np.bincount(pixels[..., channel].reshape(-1), minlength=256)
        if np.count_nonzero(counts) == 1:  # the sums below would leave a deviation of rounding errors
            means.append(float(levels[counts.argmax()]))
            deviations.append(1.0)
            continue
        mean = np.average(levels, weights=counts)
        means.append(float(mean))
        deviations.append(float(np.sqrt(np.average((levels - mean) ** 2, weights=counts))))
    return tuple(means), tuple(deviations)
