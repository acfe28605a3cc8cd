"""Schedule of the re-allocation rounds of a run."""

import dataclasses
import math

from selconv_jax._utils.arguments import check_number, check_whole
from selconv_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class ReallocationSchedule:
    """When rounds of re-allocation happen in a run (method, "Schedule and training").

    They follow epochs, or steps, of its first part, and never its last step.

    Attributes:
        until: Fraction of the epochs after which the allocation is frozen, in [0, 1]; 0: no rounds.
        every: Epochs from one round to the next.
        every_steps: Steps from one round to the next, instead of epochs, for runs of few long epochs;
            None: rounds run at the ends of epochs, as published.

    Raises:
        ConfigError: A value is out of bounds.

    Example:
        >>> from selconv_jax import ReallocationSchedule
        >>> schedule = ReallocationSchedule(until=0.5)
        >>> [schedule.is_due(epoch, epochs=5) for epoch in range(5)]
        [True, True, True, False, False]
    """

    until: float = 0.5
    every: int = 1
    every_steps: int | None = None

    def __post_init__(self) -> None:
        check_number("until", self.until, lambda share: 0 <= share <= 1, "a fraction of the epochs in [0, 1]")
        check_whole("every", self.every, 1, "a whole number of epochs, at least 1")
        if self.every_steps is not None:
            check_whole("every_steps", self.every_steps, 1, "a whole number of steps, at least 1")
        if self.every_steps is not None and self.every != 1:
            raise ConfigError(
                f"every is {self.every} and every_steps is {self.every_steps}: they exclude each other."
            )

    def is_due(self, epoch: int, epochs: int) -> bool:
        """Check whether a round follows an epoch, in a schedule by epochs.

        Args:
            epoch: Index of the epoch that has just ended, from 0.
            epochs: Number of epochs of the run.

        Returns:
            True if a round is due; never after the last epoch.

        Raises:
            ConfigError: The schedule is by steps; see `next_round`.
        """
        if self.every_steps is not None:
            raise ConfigError(
                f"every_steps is {self.every_steps}: rounds of this schedule do not follow epochs. Use "
                "next_round."
            )
        return epoch < min(self._end(epochs), epochs - 1) and (epoch + 1) % self.every == 0

    def next_round(self, first: int, steps_per_epoch: int, epochs: int) -> int | None:
        """Return the step of the next round. No round follows the last step of a run.

        Args:
            first: Smallest number of completed steps to consider.
            steps_per_epoch: Steps per epoch.
            epochs: Number of epochs of the run.

        Returns:
            Number of completed steps at which the round is due; None: there are no more rounds.

        Example:
            >>> from selconv_jax import ReallocationSchedule
            >>> schedule = ReallocationSchedule(every_steps=30)
            >>> [schedule.next_round(first, steps_per_epoch=50, epochs=4) for first in (1, 31, 91)]
            [30, 60, None]
        """
        if self.every_steps is None:
            ended = math.ceil(max(first, 1) / (steps_per_epoch * self.every)) * self.every  # epochs
            return ended * steps_per_epoch if self.is_due(ended - 1, epochs) else None
        steps = steps_per_epoch * epochs
        candidate = math.ceil(max(first, 1) / self.every_steps) * self.every_steps
        return candidate if candidate <= self._end(steps) and candidate < steps else None

    def _end(self, count: int) -> float:
        """Return ``until * count``, rounded to a whole number where only floating point makes it differ.

        In floating point 0.28 of 50 is more than 14, and 0.29 of 100 is less than 29.
        """
        end = self.until * count
        return round(end) if math.isclose(end, round(end), rel_tol=1e-12) else end
