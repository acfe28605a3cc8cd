"""The record of a run: one JSON line per epoch, and the same numbers as TensorBoard events."""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from flax import traverse_util
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from selconv_jax._utils.files import write_atomically
from selconv_jax.errors import DataError
from selconv_jax.train._state import TrainState
from selconv_jax.train._trackers import Tracker


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the records of a ``metrics.jsonl``, oldest first.

    Args:
        path: The file; it may be missing.

    Returns:
        One mapping per epoch. A truncated last line, from an interrupted write, is left out.

    Raises:
        DataError: A line before the last is not JSON, a line is not a record, or the file cannot be read.
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            if number == len(lines):
                break
            raise DataError(f"{path}, line {number}: not JSON. Remove the line to continue.") from None
        before = records[-1]["epoch"] if records else 0
        if not _is_record(record) or record["epoch"] <= before:
            raise DataError(
                f"{path}, line {number}: not the record of an epoch after {before}. "
                "Remove the line to continue."
            )
        records.append(record)
    return records


def _is_record(value: Any) -> bool:
    """Return whether a value is a mapping as `MetricsLog.write` takes it."""
    return (
        isinstance(value, dict)
        and type(value.get("epoch")) is int
        and all(
            number is None or (type(number) in (int, float) and abs(number) < math.inf)
            for number in value.values()
        )
    )


def channel_counts(state: TrainState) -> dict[str, int]:
    """Count the channels of all selective and gate-only layers, and those that are open or copies."""
    allocation = traverse_util.flatten_dict(jax.device_get(state.selectivity))
    gates = [leaf for path, leaf in allocation.items() if path[-1] == "gate"]
    return {
        "open_channels": sum(int(gate.sum()) for gate in gates),
        "copies": sum(int((leaf >= 0).sum()) for path, leaf in allocation.items() if path[-1] == "source"),
        "channels": sum(gate.size for gate in gates),
    }


def sentence(record: Mapping[str, Any], epochs: int) -> str:
    """Format the record of one of the epochs of a run as a line of text."""
    parts = [
        f"epoch {record['epoch']}/{epochs}",
        *(
            f"{split} loss {record[f'{split}_loss']:.4f}, accuracy {record[f'{split}_accuracy']:.2%}"
            for split in ("train", "validation", "test")
            if f"{split}_loss" in record
        ),
    ]
    if record["images_per_second"]:
        parts.append(f"{record['images_per_second']:,.0f} images/s")
    if record["deallocated"] or record["reallocated"]:
        parts.append(f"de-allocated {record['deallocated']}, re-allocated {record['reallocated']} channels")
    return "  ".join(parts)


class MetricsLog:
    """Writer of the records of a run: its ``metrics.jsonl``, TensorBoard ``events`` in a folder, a tracker.

    Records after ``epochs_done``, left by an interrupted run that is now resumed from an earlier checkpoint,
    are dropped. ``say`` is called with a message if events cannot be written, which does not stop the run.
    """

    def __init__(
        self,
        path: Path,
        events: Path,
        epochs_done: int = 0,
        say: Callable[[str], None] = print,
        tracker: Tracker | None = None,
    ) -> None:
        self._path = path
        kept = [record for record in read_metrics(path) if record["epoch"] <= epochs_done]
        with self._checked():
            write_atomically(path, "".join(map(_line, kept)))
        # Events of dropped epochs stay in the older files; TensorBoard no longer shows them.
        self._trackers: list[Tracker] = [
            EventLog(events, say, first=epochs_done + 1 if epochs_done else None)
        ]
        self._trackers += [tracker] if tracker is not None else []

    def write(self, record: Mapping[str, Any]) -> None:
        """Add ``epoch``, from 1, and numbers by name, None where not known; on return it is on the disk."""
        # JSON has neither infinity nor NaN.
        record = {
            name: value if value is None or math.isfinite(value) else None for name, value in record.items()
        }
        with self._checked(), self._path.open("a", encoding="utf-8") as file:
            file.write(_line(record))
            file.flush()
            os.fsync(file.fileno())
        numbers = {name: value for name, value in record.items() if name != "epoch" and value is not None}
        for tracker in self._trackers:
            tracker.write(record["epoch"], numbers)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()

    @contextlib.contextmanager
    def _checked(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"{self._path} cannot be written: {error.strerror}. Fix that and resume the run."
            ) from None


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record) + "\n"


class EventLog:
    """Writer of TensorBoard events; a failure ends the events, never the run.

    It writes in the calling thread. tensorboardX's `SummaryWriter` has a thread that dies at the first
    failure; a caller with more to write then waits for it forever. The first write creates a new file in the
    folder; events of older files from step ``first`` on are discarded.
    """

    def __init__(self, folder: Path, say: Callable[[str], None], first: int | None = None) -> None:
        self._folder, self._say, self._first = folder.absolute(), say, first
        self._writer: EventsWriter | None = None
        self._failed = False

    def write(self, number: int, values: Mapping[str, float]) -> None:
        """Add values by name at a place on the horizontal axis; on return they are on the disk."""
        if self._failed:
            return
        try:
            if self._writer is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._writer = EventsWriter(os.fspath(self._folder / "events"))
                if self._first is not None:
                    start = SessionLog(status=SessionLog.START)
                    self._writer.write_event(Event(step=self._first, session_log=start))
            parts = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
            event = Event(wall_time=time.time(), step=number, summary=Summary(value=parts))
            self._writer.write_event(event)
            self._writer.flush()
        except OSError as error:
            self._failed = True
            self._say(f"no more events for TensorBoard: {self._folder} cannot be written: {error.strerror}")

    def close(self) -> None:
        if self._writer is not None:
            with contextlib.suppress(OSError):  # reported by `write`
                self._writer.close()
