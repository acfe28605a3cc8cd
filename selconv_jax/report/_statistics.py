"""Statistics of runs: series of logged metrics, mean and spread over seeds, and differences paired by seed.

Runs of two configurations with the same seed start from the same values of their common variables and see
the same images in the same order. Such runs are pairs: the effect of the seed on both cancels in the
difference. If they see different images, for example in batches of another size, the interval is still
valid, but wider.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from selconv_jax.errors import SelconvError

CONFIDENCE = 0.95
_ROUNDING = 1e-12  # of equal differences, relative to the numbers


def require_records(records: Sequence[Mapping[str, Any]]) -> None:
    """Raise a `SelconvError` if a run's log has no record."""
    if not records:
        raise SelconvError(
            "the run has no finished epoch yet, so metrics.jsonl holds nothing to report: "
            "train at least one epoch first."
        )


def series(records: Sequence[Mapping[str, Any]], key: str) -> NDArray[np.float64]:
    """Extract one logged quantity over the epochs, ``[len(records)]`` float64.

    It is NaN where a record lacks the key, holds null or is not finite.
    """
    values = np.array(
        [np.nan if record.get(key) is None else float(record[key]) for record in records], dtype=np.float64
    )
    return np.where(np.isfinite(values), values, np.nan)


def with_gaps(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Add a record without numbers for each epoch that the log lacks, so that lines are broken there."""
    known = {record["epoch"]: record for record in records}
    return [known.get(epoch, {"epoch": epoch}) for epoch in range(min(known), max(known) + 1)]


def _is_gap(record: Mapping[str, Any]) -> bool:
    """Return whether `with_gaps` has added the record."""
    return record.keys() == {"epoch"}


def is_complete(records: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether there is a record of every epoch up to the last."""
    known = [record["epoch"] for record in records if not _is_gap(record)]
    return known == list(range(1, len(known) + 1))


def best_index(records: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the index of the first record with the highest validation accuracy.

    None if no record has one, or if the record of an epoch, which may have been the best, is missing. Test
    images are never used for the choice, as results are reported on them.
    """
    accuracy = series(records, "validation_accuracy")
    return None if np.isnan(accuracy).all() or not is_complete(records) else int(np.nanargmax(accuracy))


def last_change(records: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the last epoch (1-based) whose round closed or re-allocated a channel.

    None if none did, or if a later change is possible: if it is the last record, or a later one is missing.
    """
    changes = np.nan_to_num(series(records, "deallocated"))
    changes = changes + np.nan_to_num(series(records, "reallocated"))
    changed = np.flatnonzero(changes)
    if changed.size == 0 or changed[-1] == len(records) - 1:
        return None
    epoch, since = int(records[changed[-1]]["epoch"]), records[changed[-1] :]
    return None if any(_is_gap(record) for record in with_gaps(since)) else epoch


@dataclasses.dataclass(frozen=True)
class Spread:
    """Mean and spread of one number over runs that differ in their seed.

    Attributes:
        mean: Mean.
        std: Standard deviation of the sample (divisor n - 1); None for a single run.
        count: Number of runs.
    """

    mean: float
    std: float | None
    count: int


@dataclasses.dataclass(frozen=True)
class PairedDifference:
    """The difference of one number between two configurations, over the seeds that both have.

    Attributes:
        mean: Mean of the differences.
        std_error: Its standard error: the standard deviation of the differences (divisor n - 1) divided by
            the square root of n; 0 if they are equal, except for rounding; None for a single pair.
        interval: Lower and upper end of Student's t-interval of the mean; None for a single pair and for
            equal differences, as few test images make them: they support no claim.
        count: Number n of pairs.
    """

    mean: float
    std_error: float | None
    interval: tuple[float, float] | None
    count: int

    @property
    def excludes_zero(self) -> bool:
        """True if 0 lies outside the interval: the difference is larger than chance explains.

        Of twenty comparisons without any effect, one is expected to be true.
        """
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


def spread(values: Sequence[float]) -> Spread:
    """Compute the mean and standard deviation of at least one finite number.

    Example:
        >>> from selconv_jax.report import spread
        >>> spread([1.0, 3.0])
        Spread(mean=2.0, std=1.4142135623730951, count=2)
    """
    mean = math.fsum(values) / len(values)
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Spread(mean, deviation, len(values))


def paired_difference(
    values: Mapping[int, float], baseline: Mapping[int, float], confidence: float = CONFIDENCE
) -> PairedDifference:
    """Compute the mean difference to a baseline, paired by seed, with its standard error and t-interval.

    The interval is ``mean ± t * std_error``, for approximately normal differences.

    Args:
        values: A finite number by seed.
        baseline: The same for the other configuration. Seeds that only one of them has are ignored.
        confidence: Probability that such an interval contains the true mean, in (0, 1).

    Returns:
        Values minus baseline.

    Raises:
        SelconvError: No seed is common to both, a number is not finite, or ``confidence`` out of bounds.

    Example:
        >>> from selconv_jax.report import paired_difference
        >>> difference = paired_difference({0: 3.0, 1: 5.0, 7: 9.0}, {0: 1.0, 1: 1.0})
        >>> difference.mean, difference.std_error, difference.count
        (3.0, 1.0, 2)
    """
    if not 0 < confidence < 1:
        raise SelconvError(f"confidence is {confidence}; it must be in (0, 1).")
    seeds = sorted(values.keys() & baseline.keys())
    if not seeds:
        raise SelconvError(f"no seed is common to {sorted(values)} and {sorted(baseline)}: there is no pair.")
    differences = [values[seed] - baseline[seed] for seed in seeds]
    for seed, difference in zip(seeds, differences, strict=True):
        if not math.isfinite(difference):
            raise SelconvError(f"seed {seed} has {values[seed]} and {baseline[seed]}; both must be finite.")
    sample = spread(differences)
    largest = max(abs(value) for seed in seeds for value in (values[seed], baseline[seed]))
    if sample.std is None or sample.std <= _ROUNDING * largest:
        return PairedDifference(sample.mean, None if sample.std is None else 0.0, None, sample.count)
    error = sample.std / math.sqrt(sample.count)
    reach = float(stdtrit(sample.count - 1, (1 + confidence) / 2)) * error
    return PairedDifference(sample.mean, error, (sample.mean - reach, sample.mean + reach), sample.count)
