"""Feeds: resident and streamed batches are the same, from any step on; a streamed run resumes exactly."""

import contextlib
import dataclasses
import signal

import jax.numpy as jnp
import numpy as np
import pytest

from runs import StopAfter, assert_same_end, compiled_once, final_arrays, quiet_console, tiny_config
from selconv_jax import ConfigError
from selconv_jax.data import Split, StreamedData, load, open_data
from selconv_jax.data._dataset import DatasetInfo
from selconv_jax.data._stream import NO_IMAGE
from selconv_jax.train import _loop as loop
from selconv_jax.train import _run_setup as run_setup
from selconv_jax.train._distributed.sharding import Placement
from selconv_jax.train._feed import ResidentFeed, StreamedFeed
from selconv_jax.train._loop import resume_run, train_run
from selconv_jax.train._metrics import read_metrics
from selconv_jax.train._trainer import Trainer

pytestmark = pytest.mark.optimized

KEY = jnp.array([3, 4], jnp.uint32)
DATA = load("fashion_mnist_sample")
BATCH, STEPS = 300, 6  # 200 of the 2,000 images are left out of an epoch


def feeds(devices=1, eval_batch_size=300):
    placement = Placement.over(devices, BATCH)
    streamed = StreamedData(DATA.info, DATA.train, DATA.test)
    return (
        ResidentFeed(DATA, placement, BATCH, eval_batch_size),
        StreamedFeed(streamed, DATA.info, placement, BATCH, eval_batch_size, workers=0),
    )


def train_batches(feed, epoch, start=0):
    """Images and labels of the steps of an epoch."""
    with contextlib.closing(feed.train(KEY, epoch, start)) as batches:
        return [
            tuple(map(np.asarray, feed.take(jnp.asarray(epoch * STEPS + step), *next(batches))))
            for step in range(start, STEPS)
        ]


@pytest.mark.parametrize("start", [0, 4])
def test_streamed_batches_are_the_resident_ones(start):
    resident, streamed = feeds()
    for epoch in (0, 2):
        for pair, other in zip(
            train_batches(resident, epoch, start), train_batches(streamed, epoch, start), strict=True
        ):
            np.testing.assert_array_equal(pair[0], other[0])
            np.testing.assert_array_equal(pair[1], other[1])


def test_each_image_is_taken_once_in_an_epoch_and_in_another_order_in_the_next():
    numbered = Split(np.arange(20, dtype=np.uint8)[:, None, None, None], np.zeros(20, np.int32))
    info = DatasetInfo("toy", (1, 1, 1), 2, None, (0.5,), (0.5,), 0, False)
    feed = StreamedFeed(StreamedData(info, numbered, numbered), info, Placement.over(1, 5), 5, 5, 0)
    epochs = []
    for epoch in range(3):
        with contextlib.closing(feed.train(KEY, epoch, 0)) as batches:
            epochs.append([int(value) for images, _ in batches for value in images.reshape(-1)])
        assert sorted(epochs[-1]) == list(range(20))
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("eval_batch_size", [300, 1000, 1500])
def test_every_test_image_is_taken_once(eval_batch_size):
    for feed in feeds(eval_batch_size=eval_batch_size):
        taken = [feed.take_evaluation(*arguments) for arguments in feed.evaluation("test")]
        images, labels = (np.concatenate(parts) for parts in zip(*taken, strict=True))
        assert len(labels) == -(-1000 // eval_batch_size) * eval_batch_size
        np.testing.assert_array_equal(images[:1000], DATA.test.images)
        np.testing.assert_array_equal(labels[:1000], DATA.test.labels)
        assert (labels[1000:] == NO_IMAGE).all()


def test_streamed_batches_are_split_over_the_devices():
    _, feed = feeds(devices=2)
    with contextlib.closing(feed.train(KEY, 0, 0)) as batches:
        images, labels = next(batches)
    assert images.shape == (BATCH, 28, 28, 1)
    assert [shard.data.shape[0] for shard in images.addressable_shards] == [150, 150]
    assert len(labels.sharding.device_set) == 2


# The whole loop

CONFIG = tiny_config(
    epochs=2, eval_batch_size=30, model={"variant": "plain"}, data={"streaming": True, "mixup": 1.0}
)


@pytest.fixture(scope="module", autouse=True)
def shared_programs():
    with compiled_once():
        yield


def test_stopped_and_resumed_run_equals_an_unbroken_one(tmp_path, monkeypatch):
    console, _ = quiet_console()
    assert train_run(CONFIG, tmp_path / "whole", console) == 0
    with monkeypatch.context() as patch:
        patch.setattr(loop, "stop_request", lambda: StopAfter(2))
        assert train_run(CONFIG, tmp_path / "broken", console) == 128 + signal.SIGTERM
        assert final_arrays(tmp_path / "broken")[0] == 2  # in the middle of the first epoch
        patch.setattr(loop, "stop_request", lambda: StopAfter(9))
        assert resume_run(tmp_path / "broken", console) == 128 + signal.SIGTERM
        assert 4 <= final_arrays(tmp_path / "broken")[0] < 8
    assert resume_run(tmp_path / "broken", console) == 0
    assert_same_end(tmp_path / "broken", tmp_path / "whole")
    records = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert [record["epoch"] for record in records] == [1, 2]
    trainer, _ = run_setup.prepare(CONFIG)
    totals = trainer.evaluate(trainer.initial_state())
    assert totals.count == 100


# What a trainer refuses and chooses


def test_streamed_sets_take_one_step_per_dispatch():
    data = open_data("fashion_mnist_sample", streaming=True)
    assert Trainer(tiny_config(steps_per_dispatch=3), data).steps_per_dispatch == 1
    assert Trainer(tiny_config(steps_per_dispatch=3), DATA).steps_per_dispatch == 3


def test_padding_does_not_apply_to_images_of_differing_sizes():
    info = dataclasses.replace(DATA.info, crop_padding=0, eval_resize=32)
    data = StreamedData(info, DATA.train, DATA.test)
    with pytest.raises(ConfigError, match=r"data\.crop_padding does not apply to fashion_mnist_sample"):
        Trainer(tiny_config(data={"crop_padding": 4}), data)
    trainer = Trainer(tiny_config(data={"flip": False}), data)
    batches = trainer.batches(_state(), 0)
    with contextlib.closing(batches):
        images, labels = next(batches)
    assert images.shape == (50, 28, 28, 1)
    assert labels.shape == (50,)
    assert (trainer._step_info.crop_padding, trainer._step_info.flip) == (0, False)


def _state():
    """As much of a state as the batches follow from."""
    return type("State", (), {"key": KEY, "step": jnp.zeros((), jnp.int32)})()
