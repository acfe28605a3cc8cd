"""Write arrays as a prepared tensorflow-datasets directory, without TensorFlow.

The stock builders need TensorFlow to unpack archives and to encode images. A subclass that already
has the images, and yields them as PNG files, needs it for neither; features, keys (thus the order),
version and description stay those of the stock builder.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from selconv_jax.data.catalog import KnownSet
from selconv_jax.data.dataset import Split
from selconv_jax.data.png import encode_png
from selconv_jax.data.progress import Progress
from selconv_jax.data.quiet import quiet_tfds

__all__ = ["write_tfds"]

_REPORT_EVERY = 500


def write_tfds(known: KnownSet, splits: Mapping[str, Split], data_dir: Path, progress: Progress) -> Path:
    """Prepare a set in the array_record file format.

    Args:
        known: The catalog's entry; a stock builder has its name.
        splits: The images and labels in their original order.
        data_dir: Where to write; nothing of that name may be there.
        progress: Told how many images of each split are written.

    Returns:
        The prepared directory, ``data_dir/name/version``.
    """
    import tensorflow_datasets as tfds

    stock: Any = tfds.builder_cls(known.name)

    class _Builder(stock, skip_registration=True):  # type: ignore[misc, call-arg]
        name = known.name

        def _log_download_bytes(self) -> None:
            """Print no banner."""

        def _log_download_done(self) -> None:
            """Print no banner."""

        def _split_generators(self, dl_manager: object) -> dict[str, Iterator[tuple[int, Any]]]:
            self.info.features["label"].names = list(known.class_names)
            return {key: self._generate_examples(key, split) for key, split in splits.items()}

        def _generate_examples(self, key: str, split: Split) -> Iterator[tuple[int, Any]]:
            total = len(split)
            for index in range(total):
                example = {
                    "image": encode_png(split.images[index]),
                    "label": int(split.labels[index]),
                }
                if "id" in self.info.features:
                    example["id"] = f"{key}_{index:05d}"
                yield index, example
                if (index + 1) % _REPORT_EVERY == 0 or index + 1 == total:
                    progress(f"Writing {key} images of {known.name}", index + 1, total)

    with quiet_tfds():
        builder = _Builder(data_dir=data_dir, file_format="array_record")
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    return Path(builder.data_dir)
