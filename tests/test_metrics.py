"""The record of a run: what is taken for one, and what happens when it cannot be written."""

import errno
import os

import pytest

from selconv_jax import DataError
from selconv_jax.train._metrics import EventLog, MetricsLog, read_metrics

RECORD = b'{"epoch": 1, "test_loss": 2.5, "images_per_second": null}\n'


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (b"3\n" + RECORD, "line 1: not the record of an epoch after 0"),
        (b"null\n", "line 1: not the record"),
        (b"[1, 2]\n", "line 1: not the record"),
        (b"{}\n", "line 1: not the record"),
        (b'{"epoch": "1"}\n', "line 1: not the record"),
        (b'{"epoch": true}\n', "line 1: not the record"),
        (b'{"epoch": 1, "test_loss": "low"}\n', "line 1: not the record"),
        (b'{"epoch": 1, "test_loss": [2]}\n', "line 1: not the record"),
        (b'{"epoch": 1, "test_loss": Infinity}\n', "line 1: not the record"),
        (b'{"epoch": 1, "test_loss": NaN}\n', "line 1: not the record"),
        (RECORD + RECORD, "line 2: not the record of an epoch after 1"),
        (b"\xff\xfe\n" + RECORD, "line 1: not JSON. Remove the line to continue"),
        (b"\n" + RECORD, "line 1: not JSON"),
    ],
)
def test_lines_that_are_no_records(tmp_path, lines, said):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(lines)
    with pytest.raises(DataError) as caught:
        read_metrics(path)
    assert f"{path}, {said}" in str(caught.value)


@pytest.mark.parametrize("end", [b"", b'{"epoch": 2, "te', b"\xc3"])
def test_a_last_line_that_was_cut_off(tmp_path, end):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(RECORD + end)
    assert read_metrics(path) == [{"epoch": 1, "test_loss": 2.5, "images_per_second": None}]


def test_a_record_that_cannot_be_read_or_written(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(DataError, match=r"metrics.jsonl cannot be read: Is a directory"):
        read_metrics(tmp_path / "metrics.jsonl")
    log = MetricsLog(tmp_path / "other.jsonl", tmp_path / "events")
    (tmp_path / "other.jsonl").unlink()
    (tmp_path / "other.jsonl").mkdir()
    with pytest.raises(
        DataError, match=r"other.jsonl cannot be written: Is a directory. Fix that and resume"
    ):
        log.write({"epoch": 1})
    with pytest.raises(DataError, match=r"nowhere/metrics.jsonl cannot be written"):
        MetricsLog(tmp_path / "nowhere" / "metrics.jsonl", tmp_path / "events")


def test_events_that_cannot_be_written_end_nothing(tmp_path):
    said = []
    log = MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "events", say=said.append)
    (tmp_path / "events").touch()
    for epoch in range(1, 31):
        log.write({"epoch": epoch, "loss": 1.0})
    log.close()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 30
    reason = os.strerror(errno.EEXIST)
    assert said == [f"no more events for TensorBoard: {tmp_path / 'events'} cannot be written: {reason}"]


def test_a_disk_that_gets_full_ends_the_events_alone(tmp_path, monkeypatch):
    """More of them than tensorboardX's queue holds, for whose dead reader everyone would wait."""
    said, reason = [], os.strerror(errno.ENOSPC)
    events = EventLog(tmp_path / "events", said.append)
    events.write(0, {"loss": 1.0})

    def full(file):
        raise OSError(errno.ENOSPC, reason)

    monkeypatch.setattr(os, "fsync", full)
    for number in range(1, 31):
        events.write(number, {"loss": 1.0, "accuracy": 0.5})
    events.close()
    assert said == [f"no more events for TensorBoard: {tmp_path / 'events'} cannot be written: {reason}"]
