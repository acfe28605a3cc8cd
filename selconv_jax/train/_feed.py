"""Feeding batches to compiled steps: sliced from arrays on the devices, or streamed to them.

A feed yields the arguments that the compiled program takes besides the state, and has the pure functions
that make a batch from them inside the program. Both feeds take the images of an epoch in the same order.
"""

import abc
import collections
import contextlib
import math
from collections.abc import Generator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from selconv_jax.data._dataset import DatasetInfo, ImageData, Split
from selconv_jax.data._stream import NO_IMAGE, ImageReader, StreamedData, stream_batches
from selconv_jax.train._distributed.sharding import Placement
from selconv_jax.train._step import Purpose, epoch_order, fold

Array = jax.Array
Arguments = tuple[Any, ...]

# Batches on the devices, or in transfer, while a step is computed.
_BATCHES_ON_DEVICE = 2


class Feed(abc.ABC):
    """Batches of a data set.

    Attributes:
        one_step: Whether the arguments are those of one step; else of the whole epoch.
    """

    one_step: ClassVar[bool]

    @abc.abstractmethod
    def train(self, key: Array, epoch: int, start: int) -> Generator[Arguments]:
        """Yield the arguments of the training steps of an epoch; close it when no more are needed.

        ``key`` is the run's key data, see `TrainState`; ``start`` steps of the epoch are already done.
        """

    @abc.abstractmethod
    def take(self, step: Array, *arguments: Array) -> tuple[Array, Array]:
        """Make images ``[B, H, W, C]`` uint8 and labels ``[B]`` int32 of a training step, inside ``jit``."""

    @abc.abstractmethod
    def evaluation(self, split: str) -> Generator[Arguments]:
        """Yield the arguments of all evaluation steps on ``"test"`` or ``"validation"`` images; close it."""

    @abc.abstractmethod
    def take_evaluation(self, *arguments: Array) -> tuple[Array, Array]:
        """Make an evaluation batch, as `take`; the label `NO_IMAGE` marks padding."""

    @abc.abstractmethod
    def shapes(self, *, evaluation: bool) -> Arguments:
        """Return shapes, dtypes and shardings of the arguments, without reading an image."""


class ResidentFeed(Feed):
    """Batches of a data set that is replicated on every device.

    Each image is stored as one row: on TPU, arrays whose last dimension is a few channels would be padded to
    many times their size, and their layout changed in every call of the program.
    """

    one_step = False

    def __init__(self, data: ImageData, placement: Placement, batch_size: int, eval_batch_size: int) -> None:
        self._data, self._placement = data, placement
        self._batch_size, self._eval_batch_size = batch_size, eval_batch_size
        self._train: Arguments | None = None
        self._evaluated: Arguments | None = None
        self._order = jax.jit(epoch_order, static_argnums=2, out_shardings=placement.replicated)

    def train(self, key: Array, epoch: int, start: int) -> Generator[Arguments]:
        """Yield all images and their order, repeatedly."""
        del start  # follows from the step
        if self._train is None:
            self._train = self._placement.replicate(_rows(self._data.train))
        order = self._order(key, epoch, len(self._data.train))
        while True:
            yield (*self._train, order)

    def take(self, step: Array, *arguments: Array) -> tuple[Array, Array]:
        """Gather the images at the step's position in the order."""
        images, labels, order = arguments
        position = step % (order.shape[0] // self._batch_size)
        index = jax.lax.dynamic_slice_in_dim(order, position * self._batch_size, self._batch_size)
        return self._images(images, index), jnp.take(labels, index, axis=0)

    def evaluation(self, split: str) -> Generator[Arguments]:
        """Yield all evaluation images, the start of each batch and the end of the split."""
        if self._evaluated is None:
            parts = [_rows(part) for part in self._evaluation_parts.values()]
            self._evaluated = self._placement.replicate(tuple(map(np.concatenate, zip(*parts, strict=True))))
        begin = 0
        for key, part in self._evaluation_parts.items():
            end = begin + len(part)
            if key == split:
                for start in range(begin, end, self._eval_batch_size):
                    yield (*self._evaluated, start, end)
            begin = end

    @property
    def _evaluation_parts(self) -> dict[str, Split]:
        """Test and validation images, stored in one array so that one program evaluates both."""
        parts = {"test": self._data.test}
        return parts if self._data.validation is None else {**parts, "validation": self._data.validation}

    def take_evaluation(self, *arguments: Array) -> tuple[Array, Array]:
        """Gather the images from the batch's start on; past the end, repeat the last one as padding."""
        images, labels, start, end = arguments
        index = start + jnp.arange(self._eval_batch_size, dtype=jnp.int32)
        exists = index < end
        index = jnp.minimum(index, end - 1)
        return self._images(images, index), jnp.where(exists, jnp.take(labels, index, axis=0), NO_IMAGE)

    def _images(self, rows: Array, index: Array) -> Array:
        taken = jnp.take(rows, index, axis=0, mode="clip")
        return taken.reshape(index.shape[0], *self._data.info.image_shape)

    def shapes(self, *, evaluation: bool) -> Arguments:
        """Describe all images, and their order or the start of the batch and the end of the split."""
        parts = self._evaluation_parts.values() if evaluation else (self._data.train,)
        count, whole = sum(map(len, parts)), self._placement.replicated
        rows = (count, math.prod(self._data.train.images.shape[1:]))
        images = jax.ShapeDtypeStruct(rows, jnp.uint8, sharding=whole)
        labels = jax.ShapeDtypeStruct((count,), jnp.int32, sharding=whole)
        place = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
        return images, labels, *((place, place) if evaluation else (labels,))


def _rows(split: Split) -> Arguments:
    """Flatten a split to images ``[N, H W C]`` and labels ``[N]``."""
    return split.images.reshape(len(split), -1), split.labels


class StreamedFeed(Feed):
    """Batches that are prefetched and decoded in the background, by each process its own rows.

    ``info`` has the augmentation of the run. Batch sizes are over all processes; ``workers`` processes
    decode, or threads of this one if it is 0.
    """

    one_step = True

    def __init__(
        self,
        data: StreamedData,
        info: DatasetInfo,
        placement: Placement,
        batch_size: int,
        eval_batch_size: int,
        workers: int,
    ) -> None:
        self._data, self._info, self._placement, self._workers = data, info, placement, workers
        self._batch_size, self._eval_batch_size = batch_size, eval_batch_size
        self._order = jax.jit(epoch_order, static_argnums=2)

    def train(self, key: Array, epoch: int, start: int) -> Generator[Arguments]:
        # Each process computes these locally: processes must not wait for one another here.
        local = jnp.asarray(jax.device_get(key))
        order = np.asarray(self._order(local, epoch, len(self._data.train)))
        seed = tuple(map(int, jax.random.key_data(fold(local, Purpose.CROP, epoch))))
        reader = ImageReader(self._data.train, self._info, seed)
        return self._stream(reader, order, self._batch_size, start)

    def take(self, step: Array, *arguments: Array) -> tuple[Array, Array]:
        del step
        return self.take_evaluation(*arguments)

    def evaluation(self, split: str) -> Generator[Arguments]:
        source = self._data.test if split == "test" else self._data.validation
        assert source is not None  # asked for only where there is one
        count, size = len(source), self._eval_batch_size
        order = np.full(-(-count // size) * size, NO_IMAGE, np.int32)  # the last batch is padded
        order[:count] = np.arange(count)
        return self._stream(ImageReader(source, self._info), order, size, 0)

    def take_evaluation(self, *arguments: Array) -> tuple[Array, Array]:
        images, labels = arguments
        return images, labels

    def shapes(self, *, evaluation: bool) -> Arguments:
        size, split = self._eval_batch_size if evaluation else self._batch_size, self._placement.split
        images = jax.ShapeDtypeStruct((size, *self._info.image_shape), jnp.uint8, sharding=split)
        return images, jax.ShapeDtypeStruct((size,), jnp.int32, sharding=split)

    def _stream(
        self, reader: ImageReader, order: NDArray[np.int32], size: int, start: int
    ) -> Generator[Arguments]:
        rows = self._placement.rows_of_process(size)
        batches = stream_batches(reader, order, size, start=start, workers=self._workers, rows=rows)
        queue: collections.deque[Arguments] = collections.deque()
        with contextlib.closing(batches):
            for batch in batches:
                queue.append(self._placement.from_processes(batch))
                if len(queue) == _BATCHES_ON_DEVICE:
                    yield queue.popleft()
            yield from queue
