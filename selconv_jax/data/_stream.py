"""Streaming of batches: reading and decoding ahead, for sets that do not fit on the device.

The content of a batch depends only on its index in the epoch, not on the number of threads or
processes that decode or on where reading started. The number of completed training steps is therefore
the position in the data, and a resumed run reads the same batches as an uninterrupted one.
"""

import contextlib
import dataclasses
import gc
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterator
from multiprocessing import resource_tracker
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from selconv_jax.data._dataset import DatasetInfo
from selconv_jax.data._resize import random_resized_crop, resized_center_crop
from selconv_jax.errors import DataError

NO_IMAGE = -1
"""Index and label of the padding in the last batch."""

_MOST_THREADS = 16
_BATCHES_PER_WORKER = 2
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class ImageSource(Protocol):
    """Images with labels that are read one at a time; pickled if worker processes read them."""

    def __len__(self) -> int:
        """Return the number of images."""

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        """Read an image uint8 ``[H, W, C]`` and its label."""


@dataclasses.dataclass(frozen=True)
class SourcePart:
    """The images of a source with the indices ``places``, int64 ``[N]``."""

    source: ImageSource
    places: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        """Read an image uint8 ``[H, W, C]`` and its label, by its index in the part."""
        return self.source[int(self.places[index])]


@dataclasses.dataclass(frozen=True)
class StreamedData:
    """A data set that is streamed: its facts and its splits.

    Attributes:
        info: The facts.
        train: The training split.
        test: The test split.
        validation: Images for choosing the best epoch, disjoint from the other splits; or None.

    Raises:
        DataError: If a split is empty.
    """

    info: DatasetInfo
    train: ImageSource
    test: ImageSource
    validation: ImageSource | None = None

    def __post_init__(self) -> None:
        for key in ("train", "test", "validation"):
            split: ImageSource | None = getattr(self, key)
            if split is not None and not len(split):
                raise DataError(f"{self.info.name}, {key} split: there are no images.")


@dataclasses.dataclass(frozen=True)
class ImageReader:
    """Reader that returns images by index, all of the shape that a step takes.

    Images of a set with ``info.eval_resize`` are cropped, resized and, in training, mirrored here, with
    random numbers that depend only on the index and on ``seed``, which is different in each epoch (None: for
    testing). Images of other sets are cropped and mirrored in the compiled step.
    """

    source: ImageSource
    info: DatasetInfo
    seed: tuple[int, ...] | None = None

    def __call__(self, index: int) -> tuple[NDArray[np.uint8], np.int32]:
        """Read the image uint8 ``info.image_shape`` of an index, and its label; black for `NO_IMAGE`.

        Raises:
            DataError: If it cannot be read, has another shape, or its label is not a class.
        """
        index, shape = int(index), self.info.image_shape
        if index == NO_IMAGE:
            return np.zeros(shape, np.uint8), np.int32(NO_IMAGE)
        image, label = self.source[index]
        if not 0 <= label < self.info.num_classes:
            raise DataError(
                f"{self.info.name}: image {index} has the label {label}; expected 0 to "
                f"{self.info.num_classes - 1}."
            )
        if self.info.eval_resize is not None and image.shape[2] == shape[2]:
            image = self._resized(image, index, self.info.eval_resize)
        if image.shape != shape:
            raise DataError(
                f"{self.info.name}: image {index} is {list(image.shape)}; expected {list(shape)}. "
                "Images of differing sizes cannot be used; resize them when preparing the set."
            )
        return image, np.int32(label)

    def _resized(self, image: NDArray[np.uint8], index: int, shorter_side: int) -> NDArray[np.uint8]:
        size = self.info.image_shape[:2]
        if self.seed is None:
            return resized_center_crop(image, size, shorter_side)
        generator = np.random.default_rng((*self.seed, index))
        image = random_resized_crop(image, size, generator)
        return image[:, ::-1] if self.info.flip and generator.random() < 0.5 else image


def stream_batches(
    reader: ImageReader,
    order: NDArray[np.int32],
    batch_size: int,
    *,
    start: int = 0,
    workers: int = 0,
    rows: NDArray[np.integer[Any]] | None = None,
) -> Generator[tuple[NDArray[np.uint8], NDArray[np.int32]]]:
    """Read this process's part of each batch, some batches ahead.

    Close the iterator to stop reading; until then it holds threads or processes.

    Args:
        reader: Reads an image.
        order: int32 ``[N]``, indices of images in the order of the epoch, the same in every process. An
            incomplete last batch is dropped.
        batch_size: Images per batch, over all processes.
        start: Number of batches to skip at the beginning, without reading them.
        workers: Number of worker processes; 0: threads of this process.
        rows: ``[rows]``, indices within each batch of the images that this process reads; None: all.

    Yields:
        Images uint8 ``[rows, H, W, C]`` and labels int32 of the same length.

    Example:
        >>> from selconv_jax.data import load
        >>> data = load("fashion_mnist_sample")
        >>> batches = stream_batches(ImageReader(data.test, data.info), np.arange(9, dtype=np.int32), 4)
        >>> [labels.tolist() for _, labels in batches] == data.test.labels[:8].reshape(2, 4).tolist()
        True
    """
    # Imported here, as sets in memory do not need it.
    import absl.flags
    import grain

    batched = order[: len(order) // batch_size * batch_size].reshape(-1, batch_size)[start:]
    places = batched if rows is None else batched[:, rows]
    if not places.size:
        return
    batches = grain.MapDataset.source(places.reshape(-1)).map(reader).batch(places.shape[1])
    # Each thread reads a whole batch; worker processes take batches in turn.
    threads = 1 if workers else min(_MOST_THREADS, os.cpu_count() or 1)
    ahead = _BATCHES_PER_WORKER if workers else threads + 1
    pipeline = batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead))
    if workers:
        if not absl.flags.FLAGS.is_parsed():
            absl.flags.FLAGS.mark_as_parsed()  # grain reads a flag, whose default will do
        resource_tracker.ensure_running()  # the thread that starts it unblocks signals
        # Semaphores of earlier workers tell the tracker when they are collected. Python 3.13.0 warns of each
        # that is collected while the tracker notes a new one.
        gc.collect()
        pipeline = pipeline.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=_BATCHES_PER_WORKER),
            worker_init_fn=_live_and_die_with_the_parent,
        )
    with contextlib.ExitStack() as stack:
        with _signals_blocked():  # threads start, and these start the worker processes
            iterator = stack.enter_context(contextlib.closing(iter(pipeline)))
            first = next(iterator)
        for images, labels in itertools.chain((first,), iterator):
            # Workers send arrays in shared memory, which is reused while a JAX array may still refer to it.
            yield (np.array(images), np.array(labels)) if workers else (images, labels)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block signals, which threads and processes that are started inside inherit.

    Ctrl-C reaches every process of the terminal. A worker that died of it before it could ignore it would
    leave the thread that starts it waiting for ever.
    """
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _live_and_die_with_the_parent(worker: int, workers: int) -> None:
    """Ignore signals, which the training process handles for all, and exit when it ends."""
    del worker, workers
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker

    def follow() -> None:
        parent.join()
        os._exit(1)

    # A killed parent cannot stop its workers.
    threading.Thread(target=follow, daemon=True).start()
