"""Ctrl-C and SIGTERM as a request to stop after the current step."""

import itertools
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

__all__ = ["SharedStopRequest", "StopRequest", "stop_request"]


class StopRequest:
    """While entered, the first SIGINT or SIGTERM is noted instead of ending the process.

    A second signal acts as it would have without this: the user insists.

    Attributes:
        signal: The signal that was received, or None.

    Example:
        >>> with StopRequest() as stop:
        ...     stop.signal is None
        True
    """

    _noted: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    @property
    def exit_code(self) -> int:
        """128 plus the signal's number, as shells report it; 0 without a signal."""
        return 0 if self.signal is None else 128 + self.signal

    def __bool__(self) -> bool:
        return self.signal is not None

    def check(self) -> bool:
        """Whether to stop now; to be asked wherever the work may be left off."""
        return bool(self)

    def __enter__(self) -> "StopRequest":
        # Only the main thread may handle signals; elsewhere they end the process as usual.
        if threading.current_thread() is threading.main_thread():
            for number in self._noted:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


class SharedStopRequest(StopRequest):
    """A request to any process of a run, heard by all at the same call of `check`.

    JAX's runtime catches SIGTERM and spreads the word; SIGINT is handed to it as one.
    """

    _noted = (signal.SIGINT,)

    def __init__(self) -> None:
        super().__init__()
        self._calls = itertools.count()

    def check(self) -> bool:
        """Whether to stop now; every process asks at the same places, and gets the same answer."""
        if self.signal is None and multihost_utils.reached_preemption_sync_point(next(self._calls)):
            self.signal = signal.SIGTERM
        return bool(self)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._restore()
        signal.raise_signal(signal.SIGTERM)


def stop_request() -> StopRequest:
    """The request that suits the run: of this process alone, or of all."""
    return StopRequest() if jax.process_count() == 1 else SharedStopRequest()
