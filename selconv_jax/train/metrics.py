"""The record of a run: one JSON line per epoch, and the same numbers as TensorBoard events."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from selconv_jax.errors import DataError

__all__ = ["MetricsLog", "read_metrics"]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``, oldest first.

    A last line that was cut off while being written is left out.

    Args:
        path: The file; it may be missing.

    Returns:
        One mapping per epoch.

    Raises:
        DataError: A line before the last is no JSON.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if number == len(lines):
                break
            raise DataError(f"{path}, line {number}: not JSON. Remove the line to go on.") from None
    return records


class MetricsLog:
    """Writes the records of a run.

    Args:
        path: The ``metrics.jsonl``.
        events: Directory of the TensorBoard events.
        epochs_done: Epochs to keep: what is recorded of later ones, by a run that was cut off and is now
            resumed from an earlier checkpoint, is dropped.
    """

    def __init__(self, path: Path, events: Path, epochs_done: int = 0) -> None:
        self._path = path
        self.records = [record for record in read_metrics(path) if record["epoch"] <= epochs_done]
        temporary = path.with_name(f".{path.name}.new")
        temporary.write_text("".join(map(_line, self.records)), encoding="utf-8")
        temporary.replace(path)
        # Events of dropped epochs stay in the older files; TensorBoard hides them by the purge step.
        self._writer = SummaryWriter(str(events), purge_step=epochs_done + 1 if epochs_done else None)

    def write(self, record: Mapping[str, Any]) -> None:
        """Adds the record of an epoch; on return it is on the disk.

        Args:
            record: ``epoch``, counted from 1, and numbers by name; None where a number is not known.
        """
        # JSON has no infinity and no NaN.
        record = {
            name: value if value is None or math.isfinite(value) else None for name, value in record.items()
        }
        self.records.append(record)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line(record))
            file.flush()
            os.fsync(file.fileno())
        for name, value in record.items():
            if name != "epoch" and value is not None:
                self._writer.add_scalar(name, value, record["epoch"])
        self._writer.flush()

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record) + "\n"
