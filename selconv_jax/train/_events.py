"""The records of a run as TensorBoard events."""

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

__all__ = ["EventLog"]


class EventLog:
    """Writer of TensorBoard events; a failure ends the events, never the run.

    It writes in the calling thread. tensorboardX's `SummaryWriter` has a thread that dies at the first
    failure; a caller with more to write then waits for it forever.

    Args:
        folder: Of the events; the first write creates a new file in it.
        say: Called with the message of a failure.
        first: Events of older files from this step on are discarded; None: all are kept.
    """

    def __init__(self, folder: Path, say: Callable[[str], None], first: int | None = None) -> None:
        self._folder, self._say, self._first = folder.absolute(), say, first
        self._writer: EventsWriter | None = None
        self._failed = False

    def write(self, number: int, values: Mapping[str, float]) -> None:
        """Add values; on return they are on the disk.

        Args:
            number: Position on the horizontal axis, such as the epoch.
            values: By name.
        """
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
        """Close the file."""
        if self._writer is not None:
            with contextlib.suppress(OSError):  # reported by `write`
                self._writer.close()
