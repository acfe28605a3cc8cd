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

    Raises:
        ConfigError: A value is out of bounds.

    Example:
        >>> schedule = ReallocationSchedule(until=0.5)
        >>> [schedule.is_due(epoch, epochs=5) for epoch in range(5)]
        [True, True, True, False, False]
    """

    until: float = 0.5
    every: int = 1

    def __post_init__(self) -> None:
        if not 0.0 <= self.until <= 1.0:
            raise ConfigError(f"until is {self.until}; it must be a share of the epochs in [0, 1].")
        if self.every < 1:
            raise ConfigError(f"every is {self.every}; it must be at least 1 epoch.")

    def is_due(self, epoch: int, epochs: int) -> bool:
        """Whether a round follows on an epoch.

        Args:
            epoch: The epoch that has just ended, counted from 0.
            epochs: Number of epochs of the run.
        """
        return epoch < self.until * epochs and (epoch + 1) % self.every == 0
