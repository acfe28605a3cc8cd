"""The speed of a run, in images per second of its training steps, whatever else happens meanwhile."""

import dataclasses
import time
from types import TracebackType

import jax


class Stopwatch:
    """Sum of the seconds for which it was entered as a context."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._entered = 0.0

    def __enter__(self) -> None:
        self._entered = time.monotonic()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds += time.monotonic() - self._entered


@dataclasses.dataclass(frozen=True)
class Interruptions:
    """Time that did not go into training steps, of all runs in one program.

    Attributes:
        first_calls: Of the first call of each program of `Trainer.run_steps`, which compiles it.
        pauses: Of rounds and checkpoints between steps.
    """

    first_calls: Stopwatch = dataclasses.field(default_factory=Stopwatch)
    pauses: Stopwatch = dataclasses.field(default_factory=Stopwatch)

    @property
    def seconds(self) -> float:
        """Return the sum of all."""
        return self.first_calls.seconds + self.pauses.seconds


class Speedometer:
    """Speed of the steps of an epoch, by a clock that stands still during interruptions.

    The device may still compute what was called, so the clock starts when the first call's result is there.
    """

    def __init__(self, interruptions: Interruptions) -> None:
        self._interruptions = interruptions
        self._first_calls = interruptions.first_calls.seconds
        self._started: float | None = None
        self._images = self._latest = 0

    def add(self, images: int, result: jax.Array) -> None:
        """Count the images of a call of a program with training steps, and the array that it returned."""
        first_calls = self._interruptions.first_calls.seconds
        compiled, self._first_calls = first_calls > self._first_calls, first_calls
        if self._started is None:
            jax.block_until_ready(result)
            self._started = self._now()
            return
        self._latest = 0 if compiled else images  # what was compiled ran during the interruption
        self._images += self._latest

    def so_far(self) -> float | None:
        """Return the images per second of all calls but the latest, which may be running; None: no images."""
        return self._per_second(self._images - self._latest)

    def of_all(self) -> float | None:
        """Return the images per second of all calls, whose results are there; None: no images."""
        return self._per_second(self._images)

    def _per_second(self, images: int) -> float | None:
        return images / (self._now() - self._started) if self._started is not None and images else None

    def _now(self) -> float:
        return time.monotonic() - self._interruptions.seconds
