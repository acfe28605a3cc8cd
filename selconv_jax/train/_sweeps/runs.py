"""The runs of a sweep made, one after another or some at once in processes of their own."""

import collections
import contextlib
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from rich.console import Console

from selconv_jax.train._config import dump_config
from selconv_jax.train._progress import format_duration
from selconv_jax.train._signals import StopRequest
from selconv_jax.train._sweeps.configurations import SweepRun
from selconv_jax.train._sweeps.one_run import make_run
from selconv_jax.train._sweeps.time_left import SweepClock
from selconv_jax.train._sweeps.together import make_together

__all__ = ["SweepEnd", "run_sweep", "share_devices"]

_SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_BETWEEN_LINES = 30.0
_SECONDS_TO_DIE = 10.0
_FAILED = "failed: "
_COMMAND = (sys.executable, "-m", "selconv_jax.train._sweeps.process")


@dataclasses.dataclass(frozen=True)
class SweepEnd:
    """How a sweep ended.

    Attributes:
        code: 0 when every run is complete, 1 when one has failed, 128 plus the signal's number when it
            was asked to stop.
        failures: The error of every run that failed, in one line, by `SweepRun.name`.
    """

    code: int
    failures: Mapping[str, str]


def run_sweep(
    runs: Sequence[SweepRun], console: Console, jobs: int = 1, *, together: bool = False
) -> SweepEnd:
    """Make the runs; complete ones are kept, begun ones resumed.

    A run that fails leaves the others as they are. A signal ends the sweep as it ends a run: saved.

    Args:
        runs: From `plan_sweep`, checked by `check_sweep`.
        console: Where progress is shown.
        jobs: Runs at once. One is made in this process; more are made in processes of their own, whose
            output goes to `SweepRun.log`.
        together: All seeds of a configuration at once, in one program of this process, see `make_together`.

    Returns:
        How it ended.
    """
    return _Sweep(runs, console, jobs, together).make()


def share_devices() -> None:
    """Keep this process, and those it starts, from taking most of a GPU's memory each for itself.

    To be called before JAX sees to its devices; what the environment says of it already stays.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


class _Sweep:
    """A sweep in progress."""

    def __init__(self, runs: Sequence[SweepRun], console: Console, jobs: int, together: bool) -> None:
        self._runs, self._console, self._jobs = runs, console, jobs
        self._key: Callable[[tuple[int, SweepRun]], Any] = lambda each: each
        if together:
            self._key = lambda each: each[1].configuration
        most = max(len(list(group)) for _, group in itertools.groupby(enumerate(runs), self._key))
        self._clock = SweepClock(runs, jobs if jobs > 1 else most)
        self._failures: dict[str, str] = {}

    def make(self) -> SweepEnd:
        waiting = collections.deque[tuple[int, SweepRun]]()
        for number, run in enumerate(self._runs, start=1):
            if run.is_complete:
                self._say(f"{self._title(number, run)}: complete already")
            else:
                waiting.append((number, run))
        code = self._in_turn(waiting) if self._jobs == 1 else self._at_once(waiting)
        if code:
            complete = f"{sum(run.is_complete for run in self._runs)} of {len(self._runs)} runs complete"
            self._say(f"the sweep stopped with {complete}; the same command goes on")
            return SweepEnd(code, self._failures)
        return SweepEnd(1 if self._failures else 0, self._failures)

    def _in_turn(self, waiting: Sequence[tuple[int, SweepRun]]) -> int:
        for _, group in itertools.groupby(waiting, self._key):
            runs = []
            for number, run in group:
                self._say(self._title(number, run) + self._left())
                self._clock.start(run)
                runs.append(run)
            alone = len(runs) == 1
            ends = [make_run(run, self._console)] if alone else make_together(runs, self._console)
            for run, (code, error) in zip(runs, ends, strict=True):
                self._clock.end(run)
                if code == 1:
                    self._failures[run.name] = error
                    if alone:  # else it has been said
                        self._say(f"{_FAILED}{error}")
            if stopped := [code for code, _ in ends if code > 1]:
                return stopped[0]
        return 0

    def _at_once(self, waiting: collections.deque[tuple[int, SweepRun]]) -> int:
        """Keep as many processes busy as asked for; a request to stop is handed to each of them once."""
        processes: dict[subprocess.Popen[str], tuple[int, SweepRun]] = {}
        shown, told = time.monotonic(), False
        with StopRequest() as stop:
            try:
                while processes or (waiting and not stop):
                    while waiting and len(processes) < self._jobs and not stop:
                        number, run = waiting.popleft()
                        self._clock.start(run)
                        try:
                            processes[_start(run)] = number, run
                        except OSError as error:
                            self._clock.end(run)
                            self._fail(number, run, f"its process cannot be started: {error}")
                            continue
                        self._say(f"{self._title(number, run)}: started; its output goes to {run.log}")
                    if stop and not told:
                        told = True
                        self._say(f"stopping: {len(processes)} runs are being saved")
                        for process in processes:
                            process.terminate()
                    for process in [each for each in processes if each.poll() is not None]:
                        self._end(process, *processes.pop(process), stopping=told)
                    if time.monotonic() - shown >= _SECONDS_BETWEEN_LINES and processes:
                        shown = time.monotonic()
                        self._show([run for _, run in processes.values()])
                    time.sleep(_SECONDS_BETWEEN_LOOKS)
            finally:
                _end_now(list(processes))
        return stop.exit_code

    def _end(self, process: subprocess.Popen[str], number: int, run: SweepRun, *, stopping: bool) -> None:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        self._clock.end(run)
        title = self._title(number, run)
        if process.returncode == 0:
            self._say(f"{title}: complete{self._left()}")
        elif process.returncode == 1:
            # A failure beside a request to stop is one all the same.
            self._fail(number, run, _last_line(run).removeprefix(_FAILED))
        elif stopping:
            self._say(f"{title}: stopped")
        else:
            self._fail(number, run, f"its process ended {_way(process.returncode)} (more in {run.log})")

    def _fail(self, number: int, run: SweepRun, error: str) -> None:
        self._failures[run.name] = error
        self._say(f"{self._title(number, run)}: {_FAILED}{error}")

    def _show(self, running: Sequence[SweepRun]) -> None:
        complete = sum(run.is_complete for run in self._runs)
        epochs = ", ".join(f"{run.epochs_done}/{run.config.epochs}" for run in running)
        self._say(
            f"{complete} of {len(self._runs)} runs complete; epochs of those at work: {epochs}{self._left()}"
        )

    def _title(self, number: int, run: SweepRun) -> str:
        return f"run {number} of {len(self._runs)}: {run.name}"

    def _left(self) -> str:
        seconds = self._clock.left()
        return f" (the sweep has about {format_duration(seconds)} left)" if seconds else ""

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def _start(run: SweepRun) -> subprocess.Popen[str]:
    """A process for one run, which a signal from the terminal does not reach: it would hear it twice."""
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
    with contextlib.suppress(BrokenPipeError):  # that it has ended is noticed where it is waited for
        process.stdin.write(json.dumps({**order, "config": dump_config(run.config)}) + "\n")
        process.stdin.flush()
    return process


def _end_now(processes: Sequence[subprocess.Popen[str]]) -> None:
    """End what is left when somebody insists; runs go on from their last checkpoint."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(_SECONDS_TO_DIE)
        except subprocess.TimeoutExpired:
            process.kill()


def _way(code: int) -> str:
    """How a process ended that did not end by itself, or ended as after a signal."""
    number = -code if code < 0 else code - 128
    with contextlib.suppress(ValueError):
        return f"by {signal.Signals(number).name}"
    return f"with code {code}"


def _last_line(run: SweepRun) -> str:
    lines = run.log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "no reason given")
