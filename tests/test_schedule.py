"""When rounds of re-allocation are due, after epochs and after steps."""

import signal

import pytest

from runs import StopAfter, assert_same_end, compiled_once, quiet_console, tiny_config
from selconv_jax import ReallocationSchedule
from selconv_jax.errors import ConfigError
from selconv_jax.train import _loop as loop
from selconv_jax.train._loop import resume_run, train_run
from selconv_jax.train._metrics import read_metrics

pytestmark = pytest.mark.optimized


def rounds(schedule, steps_per_epoch=10, epochs=6):
    """All that are due, in steps done."""
    found, first = [], 1
    while (due := schedule.next_round(first, steps_per_epoch, epochs)) is not None:
        assert due >= first
        found.append(due)
        first = due + 1
    return found


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (ReallocationSchedule(), [10, 20, 30]),
        (ReallocationSchedule(every=2), [20]),
        (ReallocationSchedule(until=0.4), [10, 20, 30]),  # epoch 2, counted from 0, is before 2.4
        (ReallocationSchedule(until=1.0), [10, 20, 30, 40, 50]),  # none follows on the last step
        (ReallocationSchedule(until=0.0), []),
        (ReallocationSchedule(every_steps=7), [7, 14, 21, 28]),
        (ReallocationSchedule(every_steps=15), [15, 30]),
        (ReallocationSchedule(until=1.0, every_steps=20), [20, 40]),
        (ReallocationSchedule(until=0.0, every_steps=20), []),
        (ReallocationSchedule(until=0.55, every_steps=33), [33]),  # 0.55 * 60 is more than 33
        (ReallocationSchedule(until=1 / 3, every_steps=20), [20]),
    ],
)
def test_rounds_of_a_run(schedule, expected):
    assert rounds(schedule) == expected
    for first in range(62):
        due = schedule.next_round(first, steps_per_epoch=10, epochs=6)
        assert due == next((step for step in expected if step >= first), None)
    if schedule.every_steps is None:
        assert expected == [10 * epoch + 10 for epoch in range(6) if schedule.is_due(epoch, 6)]
    else:
        with pytest.raises(ConfigError, match="rounds of this schedule do not follow epochs"):
            schedule.is_due(0, 6)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"every_steps": 0}, "every_steps is 0"),
        ({"every": 1.5}, "every is 1.5"),
        ({"until": "half"}, "until is 'half'"),
        ({"every_steps": 5, "every": 2}, "every is 2 and every_steps is 5: they exclude each other"),
    ],
)
def test_schedules_that_make_no_sense(arguments, said):
    with pytest.raises(ConfigError, match=said):
        ReallocationSchedule(**arguments)


@pytest.mark.parametrize(("share", "count"), [(0.28, 50), (0.29, 100), (0.57, 100), (0.07, 100)])
def test_shares_of_whole_numbers_are_whole(share, count):
    """In floating point each product misses its whole number, up or down."""
    whole = round(share * count)
    assert share * count != whole
    schedule = ReallocationSchedule(until=share)
    assert [schedule.is_due(epoch, count) for epoch in range(count)].count(True) == whole
    by_steps = ReallocationSchedule(until=share, every_steps=whole)
    assert by_steps.next_round(1, steps_per_epoch=count, epochs=1) == whole
    assert by_steps.next_round(whole + 1, steps_per_epoch=count, epochs=1) is None


def test_rounds_within_epochs(tmp_path, monkeypatch):
    """Three steps apart in epochs of four; a stopped run goes on with rounds and counts as they were."""
    config = tiny_config(epochs=3, allocation={"every_steps": 3})
    console, _ = quiet_console()
    with compiled_once():
        _assert_goes_on(config, tmp_path, console, monkeypatch)


def _assert_goes_on(config, tmp_path, console, monkeypatch):
    assert train_run(config, tmp_path / "whole", console) == 0
    records = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert records[0]["deallocated"] > 0  # after step 3
    assert [record["deallocated"] > 0 for record in records[2:]] == [False]  # the last is due after step 6
    with monkeypatch.context() as patch:
        patch.setattr(loop, "stop_request", lambda: StopAfter(3))
        assert train_run(config, tmp_path / "broken", console) == 128 + signal.SIGTERM
    assert resume_run(tmp_path / "broken", console) == 0
    assert_same_end(tmp_path / "broken", tmp_path / "whole")
    for one, other in zip(read_metrics(tmp_path / "broken" / "metrics.jsonl"), records, strict=True):
        assert {**one, "images_per_second": None} == {**other, "images_per_second": None}
