"""Published specifications of TPU chips, for estimates."""

import dataclasses

__all__ = ["Chip", "chip_of"]

_MULTIPLIER = 2 * 128 * 128  # operations per cycle of one matrix unit


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU chip, after the tables in Google Cloud's documentation of its version.

    Attributes:
        memory: Bytes of its memory.
        link_bytes: Outgoing bytes per second of all its links to other chips together.
        peak: Peak operations per second in bfloat16.
        matrix_units: Number of matrix units of 128 x 128.
    """

    memory: int
    link_bytes: float
    peak: float
    matrix_units: int

    @property
    def clock(self) -> float:
        """Cycles per second, derived from the peak."""
        return self.peak / (self.matrix_units * _MULTIPLIER)


_CHIPS = {
    "v4": Chip(32 * 2**30, 2400e9 / 8, 275e12, 8),
    "v5e": Chip(16 * 2**30, 1600e9 / 8, 197e12, 4),
    "v5p": Chip(95 * 2**30, 4800e9 / 8, 459e12, 8),
}


def chip_of(topology: str) -> Chip | None:
    """Look up the chip of a topology such as ``"v5e:2x4"``; None: unknown.

    Example:
        >>> round(chip_of("v5e:2x4").clock / 1e9, 2)
        1.5
    """
    return _CHIPS.get(topology.partition(":")[0])
