"""Load a data set by name into memory, or open it for streaming."""

import importlib.resources
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selconv_jax.data._catalog import KNOWN, SAMPLE, find_known, resolve_data_dir
from selconv_jax.data._dataset import DatasetInfo, ImageData, Split, check_labels
from selconv_jax.data._records import PreparedImages, open_prepared, read_split
from selconv_jax.data._splits import Slice, SplitChoice, hold_out, resolve_splits
from selconv_jax.data._stream import ImageSource, SourcePart, StreamedData
from selconv_jax.errors import DataError

MOST_RESIDENT_BYTES = 2 * 2**30
"""Largest data set that is kept on the devices by default, in bytes."""

_SAMPLED = 1000
_DEFAULT = SplitChoice()


def load(
    name: str, data_dir: str | os.PathLike[str] | None = None, splits: SplitChoice = _DEFAULT
) -> ImageData:
    """Load the embedded sample, or a set that has been prepared; nothing is downloaded.

    Besides the sets of the catalog, it loads any image classification set of tensorflow-datasets that
    is prepared as array_record files, has features ``image`` (uint8, all of one size) and ``label``
    and splits ``train`` and ``test`` (or else ``validation``). The mean and standard deviation are then
    computed from the training images (the deviation of a constant channel is set to 1), crops are
    padded by an eighth of the height, and images are flipped.

    Args:
        name: A set of the catalog, or the name of another set of tensorflow-datasets: ``name`` or
            ``name/config``, either followed by ``:version``.
        data_dir: The directory of the prepared sets; by default that of tensorflow-datasets.
        splits: Choice of the training, validation and test images.

    Returns:
        The set in memory, images uint8 ``[N, H, W, C]``, labels int32 ``[N]``.

    Raises:
        DataError: If there is no such set, it is not prepared, one of its files is damaged, its
            images cannot be used, or it lacks the chosen splits. The message names the remedy.

    Example:
        >>> from selconv_jax.data import load
        >>> load("fashion_mnist_sample").train.images.shape
        (2000, 28, 28, 1)
    """
    data = open_data(name, data_dir, streaming=False, splits=splits)
    assert isinstance(data, ImageData)
    return data


def open_data(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    streaming: bool | None = None,
    splits: SplitChoice = _DEFAULT,
) -> ImageData | StreamedData:
    """Load a set as `load` does, or open it for streaming.

    For a streamed set outside the catalog, the mean and standard deviation are computed from a thousand
    evenly spaced training images; the labels of as many images of each split are checked. To hold out
    images, the labels of all training images are read once.

    Args:
        name: As for `load`.
        data_dir: As for `load`.
        streaming: Whether to stream; None: only if the images differ in size or take more than 2 GiB.
        splits: As for `load`.

    Raises:
        DataError: As for `load`, or if ``streaming`` is false for a set that can only be streamed.

    Example:
        >>> from selconv_jax.data import open_data
        >>> len(open_data("fashion_mnist_sample", streaming=True).train)
        2000
    """
    if name == SAMPLE:
        return _open_sample(splits, bool(streaming))
    builder = open_prepared(name, resolve_data_dir(data_dir))
    _check_features(name, builder.info.features)
    known = find_known(name)
    # The split named "test" of a known set may have no labels.
    default_test = ("test", "validation") if known is None else tuple(set(known.counts) - {"train"})
    counts = {key: split.num_examples for key, split in builder.info.splits.items()}
    parts = resolve_splits(name, splits, counts, default_test)
    label = builder.info.features["label"]
    info = None if known is None else known.info(tuple(label.names))
    differing = info is not None and info.eval_resize is not None
    if differing and streaming is False:
        raise DataError(
            f"The images of {name} differ in size, so that it can only be streamed: leave out "
            "data.streaming or set it to true."
        )
    if streaming is None:
        streaming = differing or _size(builder, parts) > MOST_RESIDENT_BYTES
    specs = {  # in the syntax of tensorflow-datasets, with whole splits by name
        key: "+".join(part.split if len(part) == counts[part.split] else str(part) for part in slices)
        for key, slices in parts.items()
    }
    if streaming:
        return _open_streamed(name, builder, specs, info, splits)
    loaded = {key: read_split(builder, spec) for key, spec in specs.items()}
    loaded |= _held_out(name, loaded["train"], splits)
    return ImageData(info or _info(name, label, [loaded["train"].images]), **loaded)


def _open_sample(splits: SplitChoice, streaming: bool) -> ImageData | StreamedData:
    """Open the first 200 training and 100 test images of each class of Fashion-MNIST, in original order.

    They come with the package, and ``FASHION_MNIST_LICENSE.txt`` beside them.
    """
    file = importlib.resources.files("selconv_jax.data") / "fashion_mnist_sample.npz"
    with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
        there = {key: Split(arrays[f"{key}_images"], arrays[f"{key}_labels"]) for key in ("train", "test")}
    counts = {key: len(split) for key, split in there.items()}
    chosen = {}
    for key, slices in resolve_splits(SAMPLE, splits, counts, ("test",)).items():
        parts = [there[part.split].take(np.arange(part.start, part.stop)) for part in slices]
        images, labels = [part.images for part in parts], [part.labels for part in parts]
        chosen[key] = Split(np.concatenate(images), np.concatenate(labels))
    chosen |= _held_out(SAMPLE, chosen["train"], splits)
    info = KNOWN[SAMPLE].info()
    return StreamedData(info, **chosen) if streaming else ImageData(info, **chosen)


def _held_out(name: str, train: Split, splits: SplitChoice) -> dict[str, Split]:
    """Split off the held-out training images, if any are asked for."""
    if splits.held_out is None:
        return {}
    kept, held = hold_out(name, train.labels, splits.held_out)
    return {"train": train.take(kept), "validation": train.take(held)}


def _open_streamed(
    name: str, builder: Any, specs: Mapping[str, str], info: DatasetInfo | None, splits: SplitChoice
) -> StreamedData:
    label = builder.info.features["label"]
    opened = {key: PreparedImages(builder, spec) for key, spec in specs.items()}
    for key, images in opened.items():
        labels = images.labels(_evenly_spaced(len(images)))
        check_labels(f"{name}, {key} split", labels, label.num_classes)
    sources: dict[str, ImageSource] = {**opened}
    if splits.held_out is not None:
        train = opened["train"]
        labels = train.labels(range(len(train)))
        check_labels(f"{name}, train split", labels, label.num_classes)
        kept, held = hold_out(name, labels, splits.held_out)
        sources |= {"train": SourcePart(train, kept), "validation": SourcePart(train, held)}
    if info is None:
        train_images = sources["train"]
        places = _evenly_spaced(len(train_images))
        info = _info(name, label, [train_images[int(place)][0] for place in places])
    return StreamedData(info, **sources)


def _evenly_spaced(count: int) -> NDArray[np.int64]:
    """Return evenly spaced indices of at most a thousand of ``count`` images."""
    return np.linspace(0, count - 1, min(_SAMPLED, count), dtype=np.int64)


def _info(name: str, label: Any, images: Sequence[NDArray[np.uint8]]) -> DatasetInfo:
    """Derive the facts of a set outside the catalog from training images ``[..., H, W, C]``.

    Means and deviations are exact, by counting. A constant channel, such as opaque alpha, gets the
    deviation 1, so that it is 0 when normalized.
    """
    height, width, channels = images[0].shape[-3:]
    levels = np.arange(256) / 255
    mean, std = [], []
    for channel in range(channels):
        counts = np.zeros(256, np.int64)
        for pixels in images:
            counts += np.bincount(pixels[..., channel].reshape(-1), minlength=256)
        if np.count_nonzero(counts) == 1:  # the formula below would return a rounding error
            mean.append(float(levels[counts.argmax()]))
            std.append(1.0)
            continue
        mean.append(float(np.average(levels, weights=counts)))
        std.append(float(np.sqrt(np.average((levels - mean[-1]) ** 2, weights=counts))))
    return DatasetInfo(
        name=name,
        image_shape=(height, width, channels),
        num_classes=label.num_classes,
        class_names=tuple(label.names),
        mean=tuple(mean),
        std=tuple(std),
        crop_padding=round(height / 8),
        flip=True,
    )


def _size(builder: Any, parts: Mapping[str, Sequence[Slice]]) -> int:
    """Estimate the bytes of all images from the shape of the first one."""
    count = sum(len(part) for slices in parts.values() for part in slices)
    shape = builder.info.features["image"].shape
    if None in shape:
        shape = PreparedImages(builder, parts["train"][0].split)[0][0].shape
    return count * math.prod(side or 0 for side in shape)


def _check_features(name: str, features: Any) -> None:
    """Raise a `DataError` unless the features are those of an image classification set."""
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
