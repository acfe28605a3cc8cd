"""Estimate of the remaining time of a sweep from the epochs made so far."""

import dataclasses
import time
from collections.abc import Callable, Sequence

from selconv_jax.train._sweeps.configurations import SweepRun

__all__ = ["Pace", "SweepClock", "seconds_left"]


@dataclasses.dataclass(frozen=True)
class Pace:
    """Progress and speed of one run in this sweep.

    Attributes:
        configuration: Runs of one configuration are assumed to be equally fast.
        epochs: Epochs made since it was started or resumed.
        seconds: Time of these epochs.
        left: Epochs to come.
    """

    configuration: str
    epochs: int
    seconds: float
    left: int


def seconds_left(paces: Sequence[Pace], jobs: int) -> float | None:
    """Estimate the time until all runs are complete.

    Args:
        paces: All runs with remaining or finished epochs. Configurations without a finished epoch are
            assumed to be as fast as the average of the others.
        jobs: Number of runs at once.

    Returns:
        Seconds, at least those of the longest run; None while no epoch has been made.

    Example:
        >>> seconds_left([Pace("plain", 2, 60.0, 8), Pace("selective", 0, 0.0, 10)], jobs=1)
        540.0
    """

    def rate(those: Sequence[Pace]) -> float | None:
        made = [pace for pace in those if pace.epochs > 0]
        epochs = sum(pace.epochs for pace in made)
        return sum(pace.seconds for pace in made) / epochs if epochs else None

    overall = rate(paces)
    if overall is None:
        return None
    each = []
    for pace in paces:
        own = rate([other for other in paces if other.configuration == pace.configuration])
        each.append(pace.left * (overall if own is None else own))
    return max(sum(each) / jobs, *each)


class SweepClock:
    """Clock of the runs of a sweep.

    Args:
        runs: All of them.
        jobs: Runs at once.
        clock: Seconds, monotonic.
    """

    def __init__(
        self, runs: Sequence[SweepRun], jobs: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._runs, self._jobs, self._clock = runs, jobs, clock
        self._started: dict[str, tuple[int, float]] = {}
        self._ended: dict[str, Pace] = {}

    def start(self, run: SweepRun) -> None:
        """Note that a run starts or resumes."""
        self._started[run.name] = run.epochs_done, self._clock()

    def end(self, run: SweepRun) -> None:
        """Note that a run has ended; an incomplete run is not continued in this sweep."""
        self._ended[run.name] = dataclasses.replace(self._pace(run), left=0)

    def left(self) -> float | None:
        """Estimate the seconds until all runs are complete, see `seconds_left`."""
        return seconds_left([self._ended.get(run.name) or self._pace(run) for run in self._runs], self._jobs)

    def _pace(self, run: SweepRun) -> Pace:
        done = run.epochs_done
        before, since = self._started.get(run.name, (done, 0.0))
        seconds = self._clock() - since if run.name in self._started else 0.0
        return Pace(run.configuration, max(done - before, 0), seconds, run.config.epochs - done)
