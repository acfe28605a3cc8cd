"""The results of a benchmark that tables, files and pictures show."""

import dataclasses
from collections.abc import Sequence

from selconv_jax._bench.measure import Summary, paired_ratio, seconds_of, summarize
from selconv_jax._bench.run import Measured, NetworkResult

__all__ = ["Ratio", "Row", "rows_of"]


@dataclasses.dataclass(frozen=True)
class Ratio:
    """Ratio of the times of two cases.

    Attributes:
        to: Name of the other case.
        medians: Ratio of the medians of both.
        paired: Median of the ratios within each round, which is less sensitive to slow phases of the machine.
    """

    to: str
    medians: float
    paired: float | None


@dataclasses.dataclass(frozen=True)
class Row:
    """A case in a report.

    Attributes:
        measured: The case.
        seconds: All repetitions, in the order of the rounds; empty if it was not timed.
        summary: Of the repetitions; None if there are none.
        images_per_second: At the median; None if it has no images.
        ratio: To the base of the case; None: it has none, or the base was not timed.
        torch_ratio: To the same case in PyTorch; below 1 is faster than PyTorch.
        memory_ratio: Total memory relative to the base.
    """

    measured: Measured
    seconds: Sequence[float]
    summary: Summary | None
    images_per_second: float | None
    ratio: Ratio | None
    torch_ratio: Ratio | None
    memory_ratio: float | None

    @property
    def name(self) -> str:
        """Of the case."""
        return self.measured.case.name

    @property
    def group(self) -> str:
        """Of the case."""
        return self.measured.case.group


def rows_of(result: NetworkResult) -> list[Row]:
    """Make the row of every case of a network, in their order."""
    by_name = {measured.case.name: measured for measured in result.cases}
    rows = []
    for measured in result.cases:
        case = measured.case
        seconds = seconds_of(result.rounds, case.name)
        summary = summarize(seconds) if seconds else None
        base = by_name.get(case.base) if case.base else None
        memory, base_memory = measured.memory, base.memory if base else None
        rows.append(
            Row(
                measured,
                seconds,
                summary,
                case.images / summary.median if summary and case.images else None,
                _ratio(result, case.name, case.base),
                _ratio(result, case.name, case.rival),
                memory["total"] / base_memory["total"] if memory and base_memory else None,
            )
        )
    return rows


def _ratio(result: NetworkResult, name: str, other: str | None) -> Ratio | None:
    if other is None:
        return None
    ours, theirs = seconds_of(result.rounds, name), seconds_of(result.rounds, other)
    if not ours or not theirs:
        return None
    ratio = summarize(ours).median / summarize(theirs).median
    return Ratio(other, ratio, paired_ratio(result.rounds, name, other))
