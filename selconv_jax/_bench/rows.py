"""The results of a benchmark that tables, files and pictures show: statistics and ratios."""

import dataclasses
import statistics
from collections.abc import Sequence

from selconv_jax._bench.run import NetworkResult, Round


@dataclasses.dataclass(frozen=True)
class Summary:
    """Number of repetitions of one case, their median, first and third quartile, and minimum, in seconds."""

    count: int
    median: float
    low: float
    high: float
    minimum: float


@dataclasses.dataclass(frozen=True)
class Ratio:
    """Ratio of the times of two cases."""

    to: str  # name of the other case
    medians: float  # of the medians of both
    paired: float | None  # median of those within each round, less sensitive to slow phases of the machine


@dataclasses.dataclass(frozen=True)
class Row:
    """A case in a report, with the names of the JSON file; the first six are those of its `Case`."""

    name: str
    group: str
    base: str | None
    images: int
    steps_per_call: int  # ``Case.steps``
    seeds: int
    summary: Summary | None  # of the repetitions; None if there are none
    images_per_second: float | None  # at the median; None if it has no images
    ratio: Ratio | None  # to the base of the case; None: it has none, or the base was not timed
    torch_ratio: Ratio | None  # to the same case in PyTorch; below 1 is faster than PyTorch
    compile: dict[str, float] | None  # seconds of ``tracing`` and ``compiling``; None: unknown
    memory: dict[str, int] | None  # see `compilation.TimedProgram`
    memory_ratio: float | None  # total memory relative to the base
    seconds: Sequence[float]  # all repetitions, in the order of the rounds; empty if it was not timed


def rows_of(result: NetworkResult) -> list[Row]:
    """Make the row of every case of a network, in their order."""
    memories = {measured.case.name: measured.memory for measured in result.cases}
    rows = []
    for measured in result.cases:
        case, memory = measured.case, measured.memory
        base_memory = memories.get(case.base) if case.base else None
        seconds = seconds_of(result.rounds, case.name)
        summary = summarize(seconds) if seconds else None
        rows.append(
            Row(
                name=case.name,
                group=case.group,
                base=case.base,
                images=case.images,
                steps_per_call=case.steps,
                seeds=case.seeds,
                summary=summary,
                images_per_second=case.images / summary.median if summary and case.images else None,
                ratio=_ratio(result, case.name, case.base),
                torch_ratio=_ratio(result, case.name, case.rival),
                compile=measured.compile,
                memory=memory,
                memory_ratio=memory["total"] / base_memory["total"] if memory and base_memory else None,
                seconds=seconds,
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


def seconds_of(rounds: Sequence[Round], name: str) -> list[float]:
    """Collect all repetitions of a case, in the order of the rounds."""
    return [seconds[name] for seconds in rounds if name in seconds]


def summarize(seconds: Sequence[float]) -> Summary:
    """Summarize at least one number; quartiles are interpolated between them (the extremes included)."""
    low, middle, high = (
        statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 3
    )
    return Summary(count=len(seconds), median=middle, low=low, high=high, minimum=min(seconds))


def paired_ratio(rounds: Sequence[Round], name: str, base: str) -> float | None:
    """Compute the median over the rounds of the ratio of two cases' times within the same round."""
    ratios = [seconds[name] / seconds[base] for seconds in rounds if name in seconds and base in seconds]
    return statistics.median(ratios) if ratios else None
