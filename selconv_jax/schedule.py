"""When a run re-allocates."""

import dataclasses

from selconv_jax.errors import ConfigError

__all__ = ["ReallocationSchedule"]


@dataclasses.dataclass(frozen=True)
class ReallocationSchedule:
    """Re-allocation after the epochs of the first part of a run (method, "Schedule and training").

    Attributes:
        until: Share of the run's epochs after which the allocation is frozen, in [0, 1]; 0: never
            re-allocate.
        every: Epochs from one round to the next.
        every_steps: Steps from one round to the next, instead of epochs, for runs of few long epochs; None:
            the rounds follow on epochs, as published.

    Raises:
        ConfigError: A value is out of bounds.

    Example:
        >>> schedule = ReallocationSchedule(until=0.5)
        >>> [schedule.is_due(epoch, epochs=5) for epoch in range(5)]
        [True, True, True, False, False]
    """

    until: float = 0.5
    every: int = 1
    every_steps: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.until <= 1.0:
            raise ConfigError(f"until is {self.until}; it must be a share of the epochs in [0, 1].")
        if self.every < 1:
            raise ConfigError(f"every is {self.every}; it must be at least 1 epoch.")
        if self.every_steps is not None and self.every_steps < 1:
            raise ConfigError(f"every_steps is {self.every_steps}; it must be at least 1 step.")
        if self.every_steps is not None and self.every != 1:
            raise ConfigError("every and every_steps do not go together: leave one out.")

    def is_due(self, epoch: int, epochs: int) -> bool:
        """Whether a round follows on an epoch, where rounds follow on epochs.

        Args:
            epoch: The epoch that has just ended, counted from 0.
            epochs: Number of epochs of the run.
        """
        return epoch < self.until * epochs and (epoch + 1) % self.every == 0

    def next_round(self, first: int, steps_per_epoch: int, epochs: int) -> int | None:
        """When the next round is due. None follows on the last step of a run.

        Args:
            first: Number of steps that will have been done at least.
            steps_per_epoch: Steps of an epoch.
            epochs: Number of epochs of the run.

        Returns:
            The number of steps done when it is due; None: there are no more rounds.

        Example:
            >>> schedule = ReallocationSchedule(every_steps=30)
            >>> [schedule.next_round(first, steps_per_epoch=50, epochs=4) for first in (1, 31, 91)]
            [30, 60, None]
        """
        steps = steps_per_epoch * epochs
        if self.every_steps is None:
            ends = ((epoch, (epoch + 1) * steps_per_epoch) for epoch in range(epochs - 1))
            due = (end for epoch, end in ends if end >= first and self.is_due(epoch, epochs))
            return next(due, None)
        candidate = -(-max(first, 1) // self.every_steps) * self.every_steps
        return candidate if candidate <= self.until * steps and candidate < steps else None
