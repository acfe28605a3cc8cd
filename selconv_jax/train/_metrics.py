"""The record of a run: one JSON line per epoch, and the same numbers as TensorBoard events."""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from selconv_jax._utils.files import write_atomically
from selconv_jax.errors import DataError
from selconv_jax.train._events import EventLog

__all__ = ["MetricsLog", "read_metrics"]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the records of a ``metrics.jsonl``, oldest first.

    A truncated last line, from an interrupted write, is left out.

    Args:
        path: The file; it may be missing.

    Returns:
        One mapping per epoch.

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


class MetricsLog:
    """Writer of the records of a run.

    Args:
        path: The ``metrics.jsonl``.
        events: Directory of the TensorBoard events.
        epochs_done: Epochs to keep: records of later ones, left by an interrupted run that is now resumed
            from an earlier checkpoint, are dropped.
        say: Called with a message if events cannot be written, which does not stop the run.

    Raises:
        DataError: The records cannot be read or written.
    """

    def __init__(
        self, path: Path, events: Path, epochs_done: int = 0, say: Callable[[str], None] = print
    ) -> None:
        self._path = path
        self.records = [record for record in read_metrics(path) if record["epoch"] <= epochs_done]
        try:
            write_atomically(path, "".join(map(_line, self.records)))
        except OSError as error:
            raise _unwritable(path, error) from None
        # Events of dropped epochs stay in the older files; TensorBoard no longer shows them.
        self._events = EventLog(events, say, first=epochs_done + 1 if epochs_done else None)

    def write(self, record: Mapping[str, Any]) -> None:
        """Add the record of an epoch; on return it is on the disk.

        Args:
            record: ``epoch``, counted from 1, and numbers by name; None where a number is not known.

        Raises:
            DataError: It cannot be written.
        """
        # JSON has neither infinity nor NaN.
        record = {
            name: value if value is None or math.isfinite(value) else None for name, value in record.items()
        }
        self.records.append(record)
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_line(record))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _unwritable(self._path, error) from None
        numbers = {name: value for name, value in record.items() if name != "epoch" and value is not None}
        self._events.write(record["epoch"], numbers)

    def close(self) -> None:
        """Close the event file."""
        self._events.close()


def _unwritable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path} cannot be written: {error.strerror}. Fix that and resume the run.")


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record) + "\n"
