"""The speed of a run, in images per second of its training steps, whatever else happens meanwhile."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator

import jax


@dataclasses.dataclass
class Interruptions:
    """Seconds that did not go into training steps, of all runs in one program.

    Attributes:
        first_calls: Of the first call of each program of `Trainer.run_steps`, which compiles it.
        pauses: Of rounds and checkpoints between steps.
    """

    first_calls: float = 0.0
    pauses: float = 0.0

    @contextlib.contextmanager
    def first_call(self) -> Iterator[None]:
        """Add the time for which it is entered to the first calls."""
        started = time.monotonic()
        yield
        self.first_calls += time.monotonic() - started

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Add the time for which it is entered to the pauses."""
        started = time.monotonic()
        yield
        self.pauses += time.monotonic() - started


class Speedometer:
    """Speed of the steps of an epoch, by a clock that stands still during interruptions.

    The device may still compute what was called, so the clock starts when the first call's result is there.
    """

    def __init__(self, interruptions: Interruptions) -> None:
        self._interruptions = interruptions
        self._first_calls = interruptions.first_calls
        self._started: float | None = None
        self._images = self._latest = 0

    def add(self, images: int, result: jax.Array) -> None:
        """Count the images of a call of a program with training steps, and the array that it returned."""
        compiled = self._interruptions.first_calls > self._first_calls
        self._first_calls = self._interruptions.first_calls
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
        return time.monotonic() - self._interruptions.first_calls - self._interruptions.pauses
