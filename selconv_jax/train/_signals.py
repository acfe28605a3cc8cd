"""Ctrl-C and other signals as a request to stop after the current step."""

import itertools
import signal
import threading
from collections.abc import Iterable
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

_INSISTING = (signal.SIGINT, signal.SIGTERM)
# A closing terminal (signalled by the system and again by the shell), and a scheduler such as Slurm that
# warns some time before it ends a job. Windows has neither signal.
_ANNOUNCING = tuple(getattr(signal, name) for name in ("SIGHUP", "SIGUSR1") if hasattr(signal, name))


class StopRequest:
    """Context in which the first SIGINT, SIGTERM, SIGHUP or SIGUSR1 is noted and does not end the process.

    A second SIGINT or SIGTERM has its usual effect: the user insists. The other two often come twice and
    never count as insisting. A process that ignores one of them (as under ``nohup``, or in the background of
    a script) continues to do so.

    Attributes:
        signal: The signal that was received, or None.
    """

    _noted: tuple[signal.Signals, ...] = _INSISTING + _ANNOUNCING

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    @property
    def exit_code(self) -> int:
        """128 plus the signal number, as shells report it; 0 without a signal."""
        return 0 if self.signal is None else 128 + self.signal

    def __bool__(self) -> bool:
        return self.signal is not None

    def check(self) -> bool:
        """Return whether to stop now; to be called wherever the work may be interrupted."""
        return bool(self)

    def __enter__(self) -> "StopRequest":
        # Only the main thread may handle signals; elsewhere they end the process as usual.
        if threading.current_thread() is threading.main_thread():
            for number in self._noted:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
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
    """A request to any process of a run, seen by all processes at the same call of `check`.

    JAX's runtime catches SIGTERM and informs all processes; other signals are forwarded to it as SIGTERM.
    """

    _noted = (signal.SIGINT, *_ANNOUNCING)

    def __init__(self) -> None:
        super().__init__()
        self._calls = itertools.count()
        self._handed_on = False

    def check(self) -> bool:
        """Return whether to stop now, the same on all processes, which must make the same calls."""
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
    """Make the request to stop for this process alone, or for all processes of the run."""
    return StopRequest() if jax.process_count() == 1 else SharedStopRequest()
