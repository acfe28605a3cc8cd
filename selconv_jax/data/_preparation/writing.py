"""Writing of prepared tensorflow-datasets directories, without TensorFlow.

The stock builders need TensorFlow to unpack archives and to encode images. A subclass that receives
the images as PNG or JPEG files needs it for neither; features, keys (thus the order), version and
description are those of the stock builder. Tiny-ImageNet has no stock builder, so it has one here;
tensorflow-datasets can read its files by name without the builder, as they describe themselves.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selconv_jax._utils.console import Progress
from selconv_jax.data._catalog import KnownSet
from selconv_jax.data._dataset import Split
from selconv_jax.data._image_formats import PixelError, as_color_jpeg, encode_png
from selconv_jax.data._preparation.cifar import COARSE_CLASSES
from selconv_jax.data._preparation.originals import ImageFiles
from selconv_jax.data._records import quiet_tfds
from selconv_jax.errors import DataError

_REPORT_EVERY = 500


Examples = Iterator[tuple[int | str, dict[str, Any]]]
"""Examples of a split to write; each has a key, which determines the order, and features by name."""


def examples_of_arrays(key: str, split: Split, coarse: NDArray[np.int32] | None = None) -> Examples:
    """Yield the images of a split in memory, with superclasses int32 ``[N]`` if the set has them."""
    for index in range(len(split)):
        image, label = split[index]
        example = {"image": encode_png(image), "label": label, "id": f"{key}_{index:05d}"}
        yield index, example if coarse is None else example | {"coarse_label": int(coarse[index])}


def examples_of_files(known: KnownSet, key: str, files: ImageFiles) -> Examples:
    """Yield the image files of a split; one that cannot be read is a `DataError` that names it."""
    size = known.image_shape[:2] if known.eval_resize is None else None
    for file in files.splits[key]():
        content = file.read()
        try:
            content = as_color_jpeg(content, size)
        except PixelError as error:
            raise DataError(f"{file.path}: {error}") from error
        except ValueError as error:
            raise DataError(f"{file.path}: cannot be read as an image ({error}). Get it again.") from error
        yield file.name, {"image": content, "label": file.label, "file_name": file.name}


def write_tfds(
    known: KnownSet,
    class_names: tuple[str, ...],
    splits: Mapping[str, Examples],
    data_dir: Path,
    progress: Progress,
) -> Path:
    """Prepare a set in the array_record file format; features that its builder does not have are left out.

    tensorflow-datasets sorts the examples by their hashed keys; sets of more than a gigabyte are written
    twice for that, which temporarily takes twice the space.

    Returns:
        The prepared directory, ``data_dir/name/version``.
    """
    import tensorflow_datasets as tfds

    class _Writer(_builder_class(known), skip_registration=True):  # type: ignore[misc, call-arg]
        name = known.name

        def _log_download_bytes(self) -> None:
            """Print no banner."""

        def _log_download_done(self) -> None:
            """Print no banner."""

        def _split_generators(self, dl_manager: object) -> dict[str, Examples]:
            features = self.info.features
            features["label"].names = list(class_names)
            if "coarse_label" in features:
                features["coarse_label"].names = list(COARSE_CLASSES)
            return {key: self._generate_examples(key, examples) for key, examples in splits.items()}

        def _generate_examples(self, key: str, examples: Examples) -> Examples:
            features, total = set(self.info.features), known.counts[key]
            for number, (place, example) in enumerate(examples, start=1):
                yield place, {name: value for name, value in example.items() if name in features}
                if number % _REPORT_EVERY == 0 or number == total:
                    progress(f"Writing {key} images of {known.name}", number, total)

    with quiet_tfds():
        builder = _Writer(data_dir=data_dir, file_format="array_record")
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    return Path(builder.data_dir)


def _builder_class(known: KnownSet) -> Any:
    """Return the stock builder, or one for the set that has none."""
    import tensorflow_datasets as tfds

    if known.name != "tiny_imagenet":
        return tfds.builder_cls(known.name)

    class _TinyImagenet(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[misc, call-arg]
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(
                builder=self,
                description=(
                    "Tiny ImageNet: 200 classes of ImageNet, 500 training and 50 validation images of "
                    "each, 64 pixels wide and high. Labels are in the sorted order of the WordNet ids."
                ),
                features=tfds.features.FeaturesDict(
                    {
                        "image": tfds.features.Image(shape=known.image_shape, encoding_format="jpeg"),
                        "label": tfds.features.ClassLabel(num_classes=known.num_classes),
                        "file_name": tfds.features.Text(),  # such as n01443537_0.JPEG
                    }
                ),
                supervised_keys=("image", "label"),
                homepage="http://cs231n.stanford.edu/",
            )

    return _TinyImagenet
