"""Streaming: what a batch holds, whoever reads it and from wherever reading starts."""

import dataclasses
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from selconv_jax.data import DatasetInfo, Split, StreamedData, load, open_data
from selconv_jax.data._stream import NO_IMAGE, ImageReader, stream_batches
from selconv_jax.errors import DataError

INFO = DatasetInfo("toy", (8, 8, 3), 4, None, (0.5,) * 3, (0.25,) * 3, 0, True)
RESIZED = dataclasses.replace(INFO, eval_resize=10)
SPLIT = Split(
    np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8),
    np.arange(30, dtype=np.int32) % 4,
)


class Differing:
    """Images whose size and pixels follow from their place; can be pickled."""

    def __len__(self):
        return 30

    def __getitem__(self, index):
        generator = np.random.default_rng(index)
        return generator.integers(0, 256, (20 + index, 40 - index, 3), dtype=np.uint8), index % 4


class SignalsBlocked(Differing):
    """Images that show whether the process of their reader was started with signals blocked."""

    def __getitem__(self, index):
        blocked = {signal.SIGINT, signal.SIGTERM} <= signal.pthread_sigmask(signal.SIG_BLOCK, ())
        return np.full((8, 8, 3), blocked, np.uint8), 0


def order(seed=0, count=30):
    return np.random.default_rng(seed).permutation(count).astype(np.int32)


def batches(reader=None, **options):
    reader = ImageReader(SPLIT, INFO) if reader is None else reader
    return [
        (images.copy(), labels.copy()) for images, labels in stream_batches(reader, order(), 8, **options)
    ]


def assert_same(actual, expected):
    assert len(actual) == len(expected)
    for pair, other in zip(actual, expected, strict=True):
        for array, other_array in zip(pair, other, strict=True):
            np.testing.assert_array_equal(array, other_array)
            assert array.dtype == other_array.dtype


def test_batches_follow_the_order():
    found = batches()
    assert [images.shape for images, _ in found] == [(8, 8, 8, 3)] * 3  # what fills no batch is left out
    for number, (images, labels) in enumerate(found):
        places = order()[8 * number : 8 * number + 8]
        np.testing.assert_array_equal(images, SPLIT.images[places])
        np.testing.assert_array_equal(labels, SPLIT.labels[places])
        assert (images.dtype, labels.dtype) == (np.uint8, np.int32)


@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_starting_later_leaves_out_the_batches_before(start):
    reader = ImageReader(Differing(), RESIZED, (1, 2))
    assert_same(batches(reader, start=start), batches(reader)[start:])


def test_processes_share_every_batch():
    whole = batches()
    parts = [batches(rows=rows) for rows in (np.arange(3), np.asarray([3, 4, 6, 7]))]
    for (images, labels), first, second in zip(whole, *parts, strict=True):
        np.testing.assert_array_equal(first[0], images[:3])
        np.testing.assert_array_equal(second[0], images[[3, 4, 6, 7]])
        np.testing.assert_array_equal(second[1], labels[[3, 4, 6, 7]])


def test_other_numbers_of_workers_give_the_same_batches():
    reader = ImageReader(Differing(), RESIZED, (1, 2))
    expected = batches(reader)
    for workers in (1, 2):
        assert_same(batches(reader, workers=workers), expected)


def test_workers_are_started_with_signals_blocked():
    """Ctrl-C that kills a worker while it starts would leave the program waiting for ever."""
    found = batches(ImageReader(SignalsBlocked(), INFO), workers=2)
    assert all(images.all() for images, _ in found)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_a_reader_arrive_as_they_are(workers):
    reader = ImageReader(SPLIT, dataclasses.replace(INFO, num_classes=2))
    with pytest.raises(DataError, match=r"^toy: image \d+ has the label [23]; expected 0 to 1"):
        batches(reader, workers=workers)


def test_reading_is_bounded_and_ends_with_the_iterator():
    read = []

    class Counted(Differing):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    places = np.tile(order(), 100)
    iterator = stream_batches(ImageReader(Counted(), RESIZED), places, 2)
    next(iterator)
    iterator.close()
    # A batch was taken, and one for each of at most 16 threads and one more begun.
    assert 2 <= len(read) <= 2 * 19


def test_augmentation_follows_from_seed_and_place():
    def read(seed, index):
        return ImageReader(Differing(), RESIZED, seed)(index)[0]

    for index in (0, 7):
        np.testing.assert_array_equal(read((1, 2), index), read((1, 2), index))
        assert (read((1, 2), index) != read((1, 3), index)).any()
    assert read((1, 2), 3).shape == (8, 8, 3)


def test_half_of_the_parts_are_mirrored():
    class Ramp(Differing):
        def __getitem__(self, index):
            return np.tile(np.arange(64, dtype=np.uint8)[None, :, None], (64, 1, 3)), 0

    def rising(info):
        reader = ImageReader(Ramp(), info, (5,))
        images = [reader(index)[0].astype(int) for index in range(200)]
        return np.mean([image[0, -1, 0] > image[0, 0, 0] for image in images])

    assert rising(RESIZED) == pytest.approx(0.5, abs=0.1)
    assert rising(dataclasses.replace(RESIZED, flip=False)) == 1


def test_no_image_is_black_and_marked():
    image, label = ImageReader(SPLIT, INFO)(NO_IMAGE)
    assert image.shape == (8, 8, 3)
    assert not image.any()
    assert label == NO_IMAGE


def test_images_of_another_shape():
    with pytest.raises(DataError, match=r"toy: image 4 is \[24, 36, 3\]; expected \[8, 8, 3\]"):
        ImageReader(Differing(), INFO)(4)


def test_empty_split():
    empty = Split(np.zeros((0, 8, 8, 3), np.uint8), np.zeros(0, np.int32))
    with pytest.raises(DataError, match="toy, test split: there are no images"):
        StreamedData(INFO, SPLIT, empty)


def test_the_sample_can_be_streamed():
    whole, streamed = load("fashion_mnist_sample"), open_data("fashion_mnist_sample", streaming=True)
    assert isinstance(streamed, StreamedData)
    assert streamed.info == whole.info
    np.testing.assert_array_equal(streamed.train[3][0], whole.train.images[3])
    assert not isinstance(open_data("fashion_mnist_sample"), StreamedData)


_KILLED = """
import multiprocessing, sys, time
import numpy as np
from selconv_jax.data import load
from selconv_jax.data._stream import ImageReader, stream_batches

if __name__ == "__main__":
    data = load("fashion_mnist_sample")
    order = np.arange(1000, dtype=np.int32)
    batches = stream_batches(ImageReader(data.test, data.info), order, 10, workers=1)
    next(batches)
    print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
    time.sleep(600)
"""


def test_workers_do_not_outlive_a_killed_process(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(_KILLED)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as process:
        workers = [int(word) for word in process.stdout.readline().split()]
        process.kill()
    assert workers
    deadline = time.monotonic() + 30
    while any(_lives(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(_lives(worker) for worker in workers)


def _lives(process):
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0]
    except OSError:
        return False
    return state != "Z"
