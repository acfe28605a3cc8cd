"""Ctrl-C and other signals as a request to stop after the current step."""

import itertools
import signal
import threading
from collections.abc import Iterable
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

__all__ = ["SharedStopRequest", "StopRequest", "stop_request"]


_INSISTING = (signal.SIGINT, signal.SIGTERM)
# A terminal that closes (once from the system, once more from the shell), and a queue such as Slurm's, asked
# to tell some time before it ends a job. Windows knows neither.
_ANNOUNCING = tuple(getattr(signal, name) for name in ("SIGHUP", "SIGUSR1") if hasattr(signal, name))


class StopRequest:
    """While entered, the first SIGINT, SIGTERM, SIGHUP or SIGUSR1 is noted instead of ending the process.

    A second SIGINT or SIGTERM acts as it would have without this: the user insists. Nobody insists by the
    other two, which often come twice; a process that ignores them (as under ``nohup``) goes on doing so.

    Attributes:
        signal: The signal that was received, or None.

    Example:
        >>> with StopRequest() as stop:
        ...     stop.signal is None
        True
    """

    _noted: tuple[signal.Signals, ...] = _INSISTING + _ANNOUNCING

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
                if number in _INSISTING or signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore(self._noted)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.signal = self.signal or number
        self._restore(_INSISTING)

    def _restore(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            if number in self._previous:
                signal.signal(number, self._previous.pop(number))


class SharedStopRequest(StopRequest):
    """A request to any process of a run, heard by all at the same call of `check`.

    JAX's runtime catches SIGTERM and spreads the word; the other signals are handed to it as one.
    """

    _noted = (signal.SIGINT, *_ANNOUNCING)

    def __init__(self) -> None:
        super().__init__()
        self._calls = itertools.count()
        self._handed_on = False

    def check(self) -> bool:
        """Whether to stop now; every process asks at the same places, and gets the same answer."""
        if self.signal is None and multihost_utils.reached_preemption_sync_point(next(self._calls)):
            self.signal = signal.SIGTERM
        return bool(self)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._restore(_INSISTING)
        if not self._handed_on:
            self._handed_on = True
            signal.raise_signal(signal.SIGTERM)


def stop_request() -> StopRequest:
    """The request that suits the run: of this process alone, or of all."""
    return StopRequest() if jax.process_count() == 1 else SharedStopRequest()
