"""Estimate of the remaining time of a sweep from the epochs made so far."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from selconv_jax.train._sweeps.configurations import SweepRun


class Pace(NamedTuple):
    """Progress of one run in this sweep: epochs made in how many seconds, and epochs to come."""

    configuration: str
    epochs: int
    seconds: float
    left: int


def seconds_left(paces: Sequence[Pace], jobs: int, *, together: bool = False) -> float | None:
    """Estimate the seconds until all runs are complete, of which ``jobs`` are made at once.

    It is at least the time of the longest run. With ``together``, those of a configuration are made at once,
    and the configurations one after another.

    Runs of one configuration are assumed to be equally fast, and configurations without a finished epoch as
    fast as the average of the others. None while no epoch has been made.
    """

    def rate(those: Sequence[Pace]) -> float | None:
        made = [pace for pace in those if pace.epochs > 0]
        return sum(pace.seconds for pace in made) / sum(pace.epochs for pace in made) if made else None

    overall = rate(paces)
    if overall is None:
        return None
    each = []
    for pace in paces:
        own = rate([other for other in paces if other.configuration == pace.configuration])
        each.append(pace.left * (overall if own is None else own))
    if together:
        longest: dict[str, float] = {}
        for pace, seconds in zip(paces, each, strict=True):
            longest[pace.configuration] = max(seconds, longest.get(pace.configuration, 0.0))
        return sum(longest.values())
    return max(sum(each) / jobs, *each)


class SweepClock:
    """Clock of the runs of a sweep; for ``jobs`` and ``together`` see `seconds_left`."""

    def __init__(
        self,
        runs: Sequence[SweepRun],
        jobs: int,
        clock: Callable[[], float] = time.monotonic,
        *,
        together: bool = False,
    ) -> None:
        self._runs, self._jobs, self._clock, self._together = runs, jobs, clock, together
        self._started: dict[str, tuple[int, float]] = {}
        self._ended: dict[str, Pace] = {}

    def start(self, run: SweepRun) -> None:
        """Note that a run starts or resumes."""
        self._started[run.name] = run.epochs_done, self._clock()

    def end(self, run: SweepRun) -> None:
        """Note that a run has ended; an incomplete run is not continued in this sweep."""
        self._ended[run.name] = self._pace(run)._replace(left=0)

    def left(self) -> float | None:
        """Estimate the seconds until all runs are complete, see `seconds_left`."""
        paces = [self._ended.get(run.name) or self._pace(run) for run in self._runs]
        return seconds_left(paces, self._jobs, together=self._together)

    def _pace(self, run: SweepRun) -> Pace:
        done, now = run.epochs_done, self._clock()
        before, since = self._started.get(run.name, (done, now))
        return Pace(run.configuration, max(done - before, 0), now - since, run.config.epochs - done)
