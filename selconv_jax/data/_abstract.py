"""Data sets without images, for computations that only need shapes."""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from selconv_jax.data._catalog import find_known
from selconv_jax.data._dataset import ImageData, Split
from selconv_jax.data._loading import MOST_RESIDENT_BYTES, open_data
from selconv_jax.data._splits import SplitChoice, held_out_count, resolve_splits
from selconv_jax.data._stream import StreamedData
from selconv_jax.errors import DataError

_DEFAULT = SplitChoice()


@dataclasses.dataclass(frozen=True)
class _NoImages:
    """A source of ``count`` images that cannot be read."""

    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        raise DataError(f"image {index} cannot be read: the data set was opened without images.")


def abstract_data(
    name: str, data_dir: str | None = None, streaming: bool | None = None, splits: SplitChoice = _DEFAULT
) -> ImageData | StreamedData:
    """Create a data set of the same shapes as `open_data`, with black images that take no memory.

    A set of the catalog need not be prepared. Any other must be, and is opened with its images.

    Example:
        >>> len(abstract_data("imagenet2012").train)
        1281167
    """
    known = find_known(name)
    if known is None:
        return open_data(name, data_dir, streaming, splits)
    info = known.info(tuple(f"class {number}" for number in range(known.num_classes)))
    parts = resolve_splits(name, splits, known.counts, tuple(set(known.counts) - {"train"}))
    counts = {key: sum(map(len, slices)) for key, slices in parts.items()}
    if splits.held_out is not None:
        counts["validation"] = held_out_count(splits.held_out, counts["train"])
        if not 0 < counts["validation"] < counts["train"]:
            raise DataError(
                f"{name}: data.validation is {splits.held_out}, which is {counts['validation']} of "
                f"{counts['train']} training images. Hold out some of them, but not all."
            )
        counts["train"] -= counts["validation"]
    if streaming is None:
        size = sum(counts.values()) * int(np.prod(info.image_shape))
        streaming = info.eval_resize is not None or size > MOST_RESIDENT_BYTES
    if streaming:
        return StreamedData(info, **{key: _NoImages(count) for key, count in counts.items()})
    return ImageData(info, **{key: _black(count, info.image_shape) for key, count in counts.items()})


def _black(count: int, shape: tuple[int, ...]) -> Split:
    images = np.broadcast_to(np.zeros((), np.uint8), (count, *shape))
    return Split(images, np.broadcast_to(np.zeros((), np.int32), count))
