"""Making the runs of a sweep, one after another or several at once in their own processes."""

import collections
import contextlib
import dataclasses
import itertools
import json
import operator
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

import jax
from rich.console import Console

from selconv_jax._utils.console import print_line
from selconv_jax.train._config import dump_config
from selconv_jax.train._progress import format_duration
from selconv_jax.train._signals import StopRequest
from selconv_jax.train._sweeps.configurations import SweepRun
from selconv_jax.train._sweeps.one_run import make_run
from selconv_jax.train._sweeps.time_left import SweepClock
from selconv_jax.train._sweeps.together import make_together

_SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_BETWEEN_LINES = 30.0
_SECONDS_TO_DIE = 10.0
_FAILED = "failed: "
_COMMAND = (sys.executable, "-m", "selconv_jax.train._sweeps.one_run")


@dataclasses.dataclass(frozen=True)
class SweepEnd:
    """The end of a sweep.

    Attributes:
        code: 0 when every run is complete, 1 when one has failed, 128 plus the number of a signal.
        failures: The error of every run that failed, in one line, by `SweepRun.name`.
    """

    code: int
    failures: Mapping[str, str]


def run_sweep(
    runs: Sequence[SweepRun], console: Console, jobs: int = 1, *, together: bool = False
) -> SweepEnd:
    """Make all runs of a sweep; complete runs are kept, incomplete ones resumed.

    A run that fails does not affect the others. A signal stops the sweep like a run: it is saved first. Of
    several ``jobs`` at once, each is made in its own process, whose output goes to `SweepRun.log`. With
    ``together``, all seeds of a configuration are made in one program of this process.
    """
    return _Sweep(runs, console, jobs, together).make()


def share_devices() -> None:
    """Keep this process and its children from preallocating most of a GPU's memory each.

    To be called before JAX initializes its devices; a setting in the environment takes precedence.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


class _Sweep:
    """A sweep in progress."""

    def __init__(self, runs: Sequence[SweepRun], console: Console, jobs: int, together: bool) -> None:
        self._runs, self._console, self._jobs = runs, console, jobs
        self._group = operator.attrgetter("configuration" if together else "name")
        self._clock = SweepClock(runs, jobs, together=together)
        self._failures: dict[str, str] = {}

    def make(self) -> SweepEnd:
        waiting = collections.deque[SweepRun]()
        for run in self._runs:
            if run.is_complete:
                self._say(f"{self._title(run)}: complete already")
            else:
                waiting.append(run)
        code = self._in_turn(waiting) if self._jobs == 1 else self._at_once(waiting)
        if code:
            self._say(f"the sweep stopped with {self._complete()}; resume it with the same command")
        return SweepEnd(code or (1 if self._failures else 0), self._failures)

    def _in_turn(self, waiting: Sequence[SweepRun]) -> int:
        for _, group in itertools.groupby(waiting, self._group):
            runs = list(group)
            for run in runs:
                self._say(self._title(run) + self._left())
                self._clock.start(run)
            alone = len(runs) == 1
            ends = [make_run(run, self._console)] if alone else make_together(runs, self._console)
            for run, (code, error) in zip(runs, ends, strict=True):
                self._clock.end(run)
                if code == 1:
                    self._failures[run.name] = error
                    if alone:  # else it has been reported
                        self._say(f"{_FAILED}{error}")
            if stopped := [code for code, _ in ends if code > 1]:
                return stopped[0]
        return 0

    def _at_once(self, waiting: collections.deque[SweepRun]) -> int:
        """Keep ``jobs`` processes busy; forward a request to stop to each of them once."""
        processes: dict[subprocess.Popen[str], SweepRun] = {}
        shown, told = time.monotonic(), False
        with StopRequest() as stop:
            try:
                while processes or (waiting and not stop):
                    while waiting and len(processes) < self._jobs and not stop:
                        run = waiting.popleft()
                        self._clock.start(run)
                        try:
                            processes[_start(run)] = run
                        except OSError as error:
                            self._clock.end(run)
                            self._fail(run, f"its process cannot be started: {error}")
                            continue
                        self._say(f"{self._title(run)}: started; its output goes to {run.log}")
                    if stop and not told:
                        told = True
                        self._say(f"stopping: {len(processes)} runs are being saved")
                        for process in processes:
                            process.terminate()
                    for process in [each for each in processes if each.poll() is not None]:
                        self._end(process, processes.pop(process), stopping=told)
                    if time.monotonic() - shown >= _SECONDS_BETWEEN_LINES and processes:
                        shown = time.monotonic()
                        epochs = ", ".join(
                            f"{run.epochs_done}/{run.config.epochs}" for run in processes.values()
                        )
                        self._say(f"{self._complete()}; epochs of running ones: {epochs}{self._left()}")
                    time.sleep(_SECONDS_BETWEEN_LOOKS)
            finally:
                _end_now(list(processes))
        return stop.exit_code

    def _end(self, process: subprocess.Popen[str], run: SweepRun, *, stopping: bool) -> None:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        self._clock.end(run)
        title = self._title(run)
        if process.returncode == 0:
            self._say(f"{title}: complete{self._left()}")
        elif process.returncode == 1:
            # A failure counts even after a request to stop.
            self._fail(run, _last_line(run).removeprefix(_FAILED))
        elif stopping:
            self._say(f"{title}: stopped")
        else:
            self._fail(run, f"its process ended {_way(process.returncode)} (more in {run.log})")

    def _fail(self, run: SweepRun, error: str) -> None:
        self._failures[run.name] = error
        self._say(f"{self._title(run)}: {_FAILED}{error}")

    def _complete(self) -> str:
        return f"{sum(run.is_complete for run in self._runs)} of {len(self._runs)} runs complete"

    def _title(self, run: SweepRun) -> str:
        return f"run {self._runs.index(run) + 1} of {len(self._runs)}: {run.name}"

    def _left(self) -> str:
        seconds = self._clock.left()
        return f" (the sweep has about {format_duration(seconds)} left)" if seconds else ""

    def _say(self, text: str) -> None:
        print_line(self._console, text)


def _start(run: SweepRun) -> subprocess.Popen[str]:
    """Start a process for one run, shielded from the terminal's signals, which are forwarded to it."""
    run.log.parent.mkdir(parents=True, exist_ok=True)
    share_devices()
    environment = dict(os.environ)
    if folder := jax.config.jax_compilation_cache_dir:
        environment["JAX_COMPILATION_CACHE_DIR"] = folder
    with run.log.open("a", encoding="utf-8") as log:
        process = subprocess.Popen(
            _COMMAND,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            text=True,
            env=environment,
            start_new_session=True,
        )
    assert process.stdin is not None
    order = {"configuration": run.configuration, "workdir": os.fspath(run.workdir)}
    with contextlib.suppress(BrokenPipeError):  # its end is noticed by the loop that waits for it
        process.stdin.write(json.dumps({**order, "config": dump_config(run.config)}) + "\n")
        process.stdin.flush()
    return process


def _end_now(processes: Sequence[subprocess.Popen[str]]) -> None:
    """End the remaining processes at a second signal; their runs can resume from the last checkpoint."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(_SECONDS_TO_DIE)
        except subprocess.TimeoutExpired:
            process.kill()


def _way(code: int) -> str:
    """Describe the signal or code with which a process ended."""
    number = -code if code < 0 else code - 128
    with contextlib.suppress(ValueError):
        return f"by {signal.Signals(number).name}"
    return f"with code {code}"


def _last_line(run: SweepRun) -> str:
    lines = run.log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "no reason given")
