"""Reading of prepared tensorflow-datasets directories, whole or image by image, without TensorFlow."""

import contextlib
import difflib
import functools
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from selconv_jax.data._catalog import KNOWN, find_known, prepare_command, prepared_directories
from selconv_jax.data._dataset import Split
from selconv_jax.data._image_formats import PixelError, decode_image
from selconv_jax.errors import DataError, nearest

T = TypeVar("T")

_NAME = re.compile(r"\w+(/[\w.+-]+)?(:\d+\.\d+\.\d+)?")
_AT_ONCE = 1024  # records held as bytes at a time
_REMEDY = "Remove its folder and prepare the set again."


@contextlib.contextmanager
def quiet_tfds() -> Iterator[None]:
    """Silence the progress bars and warnings of tensorflow-datasets inside the block; its errors still raise.

    It draws its own progress bars, and warns through the logger of ``absl``, as of an unprepared data set.
    """
    import absl.logging
    from tensorflow_datasets.core.utils import tqdm_utils

    logger = absl.logging.get_absl_logger()
    level = logger.level
    bars = getattr(tqdm_utils, "_active", True)
    logger.setLevel(logging.CRITICAL)
    tqdm_utils.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            tqdm_utils.enable_progress_bar()


def open_prepared(name: str, data_dir: Path) -> Any:
    """Open the builder of a prepared set, without ever searching for it on the network."""
    known = find_known(name)
    prepared = prepared_directories(data_dir)
    if not _NAME.fullmatch(name):
        raise DataError(
            f"{name!r} is not a name of a data set. {nearest(name, {*KNOWN, *prepared})} Others are "
            "named as in tensorflow-datasets: name, name/config or name:version."
        )

    import tensorflow_datasets as tfds

    builder: Any = None
    found, file_format = False, tfds.core.FileFormat.ARRAY_RECORD
    with quiet_tfds():
        try:
            builder = tfds.builder(name, data_dir=data_dir)
            found = builder.is_prepared()
            file_format = builder.info.file_format
        except tfds.core.DatasetNotFoundError as error:
            if known is None:  # else it is a set that tensorflow-datasets does not have by itself
                stock = tfds.list_builders(with_community_datasets=False)
                options = {*KNOWN, *prepared, *difflib.get_close_matches(name, stock)}
                raise DataError(
                    f"There is no data set {name!r}, prepared in {data_dir} or known otherwise. "
                    f"{nearest(name, options)}"
                ) from error
        except Exception as error:  # assertions, parse errors and others
            raise DataError(
                f"{name} cannot be opened in {data_dir} ({error}). If its folder is damaged, "
                "remove it and prepare the set again."
            ) from error
    if builder is None or not found:
        raise DataError(
            f"{name} is not prepared in {data_dir}. Run: {prepare_command(known.name, data_dir)} "
            f"(PATH: the folder or archive, got from {known.origin}"
            f"{'; without --from it is downloaded' if known.downloads else ''})."
            if known
            else f"{name} is not prepared in {data_dir}. Prepare it where TensorFlow is installed: "
            f"tfds build {name} --file_format=array_record --data_dir={data_dir}"
        )
    if file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise DataError(
            f"{builder.data_dir} holds {file_format.value} files, which cannot be "
            "read without TensorFlow. Prepare the set as array_record files in another directory."
        )
    return builder


def read_split(builder: Any, name: str) -> Split:
    """Read every image and label of a split in the order of its files.

    Args:
        builder: From `open_prepared`.
        name: The split, or slices of splits with whole numbers as boundaries.

    Raises:
        DataError: If a file is missing or damaged, or the images differ in size.
    """
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from tensorflow_datasets.proto import tf_example_pb2

    channels = builder.info.features["image"].shape[-1]
    split = builder.info.splits[name]
    labels = np.empty(split.num_examples, np.int32)
    images: NDArray[np.uint8] | None = None
    index = 0
    for path, part, length in _files(split):
        for number, record in zip(part, _records(path, part, length), strict=True):
            try:
                image, label = _decode(tf_example_pb2.Example.FromString(record), channels)
            except (ValueError, DecodeError) as error:
                raise _unreadable(f"{path}, record {number}", error) from error
            if images is None:
                images = np.empty((len(labels), *image.shape), np.uint8)
            if image.shape != images.shape[1:]:
                raise DataError(
                    f"{path}, record {number}: an image of shape {list(image.shape)} after others "
                    f"of {list(images.shape[1:])}. Images of differing sizes cannot be loaded; "
                    "resize them when preparing the set."
                )
            images[index], labels[index] = image, label
            index += 1
    if images is None:
        raise DataError(f"{builder.data_dir}: the split {name} is empty.")
    return Split(images, labels)


class PreparedImages:
    """The images of a split, read and decoded on access; ``builder`` and ``name`` are as for `read_split`.

    Raises:
        DataError: If a file is missing; on access, if the image is damaged.
    """

    def __init__(self, builder: Any, name: str) -> None:
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        split = builder.info.splits[name]
        for path, _, _ in _files(split):
            if not path.is_file():
                raise DataError(f"{path}: the file is missing. {_REMEDY}")
        self._where = f"{builder.data_dir}, split {name}"
        self._channels = builder.info.features["image"].shape[-1]
        self._length = split.num_examples
        self._records = ArrayRecordDataSource(split.file_instructions) if self._length else ()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        """Read an image uint8 ``[H, W, C]`` and its label."""
        return self._read(index, functools.partial(_decode, channels=self._channels))

    def labels(self, places: Iterable[int]) -> NDArray[np.int32]:
        """Read the labels of ``N`` images, int32 ``[N]``, without decoding the images."""
        return np.fromiter((self._read(int(place), _label) for place in places), np.int32)

    def _read(self, index: int, decode: Callable[[Any], T]) -> T:
        from google.protobuf.message import DecodeError
        from tensorflow_datasets.proto import tf_example_pb2

        try:
            return decode(tf_example_pb2.Example.FromString(self._records[index]))
        except (ValueError, RuntimeError, IndexError, DecodeError) as error:
            raise _unreadable(f"{self._where}, record {index}", error) from error


def _files(split: Any) -> list[tuple[Path, range, int]]:
    """List the files of a split, with the range of records that belong to it, and their total number."""
    return [
        (Path(file.filename), range(file.skip, file.skip + file.take), file.examples_in_shard)
        for file in split.file_instructions
    ]


def _records(path: Path, part: range, length: int) -> Iterator[bytes]:
    """Yield some of the ``length`` records of one file as bytes."""
    from array_record.python.array_record_module import ArrayRecordReader

    if not path.is_file():
        raise DataError(f"{path}: the file is missing. {_REMEDY}")
    reader = ArrayRecordReader(str(path))
    try:
        found = reader.num_records()
        if found != length:
            reader.close()  # raises what is wrong with the file, if anything is
            raise DataError(f"{path}: {found} records, expected {length}. {_REMEDY}")
        for start in range(part.start, part.stop, _AT_ONCE):
            yield from reader.read(start, min(start + _AT_ONCE, part.stop))
        reader.close()
    except (RuntimeError, IndexError) as error:
        raise DataError(f"{path}: damaged or cut short ({error}). {_REMEDY}") from error


def _unreadable(where: str, error: Exception) -> DataError:
    """Create the error for a record that could not be decoded."""
    if isinstance(error, PixelError):
        return DataError(f"{where}: {error}")
    return DataError(f"{where}: damaged ({error}). {_REMEDY}")


def _decode(example: Any, channels: int | None) -> tuple[NDArray[np.uint8], int]:
    """Decode the image and the label of a record; raise a ValueError if it is damaged."""
    image = example.features.feature["image"].bytes_list.value
    if len(image) != 1:
        raise ValueError("it does not hold one image and one label")
    return decode_image(image[0], channels), _label(example)


def _label(example: Any) -> int:
    """Decode the label of a record; raise a ValueError if it is damaged."""
    label = example.features.feature["label"].int64_list.value
    if len(label) != 1:
        raise ValueError("it does not hold one image and one label")
    return int(label[0])
