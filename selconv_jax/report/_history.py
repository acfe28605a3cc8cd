"""Time series of a run's logged metrics, for the curves and the tables."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selconv_jax.errors import SelconvError

__all__ = ["best_index", "last_change", "require_records", "series"]


def require_records(records: Sequence[Mapping[str, Any]]) -> None:
    """Raise a `SelconvError` if the log is empty.

    Args:
        records: The lines of ``metrics.jsonl``.

    Raises:
        SelconvError: There are none.
    """
    if not records:
        raise SelconvError(
            "the run has no finished epoch yet, so metrics.jsonl holds nothing to report: "
            "train at least one epoch first."
        )


def series(records: Sequence[Mapping[str, Any]], key: str) -> NDArray[np.float64]:
    """Extract one logged quantity over the epochs.

    Args:
        records: The lines of ``metrics.jsonl``.
        key: The name of the quantity.

    Returns:
        ``[len(records)]`` float64; NaN where a record lacks the key, holds null or is not finite.

    Example:
        >>> series([{"epoch": 1, "test_loss": 0.5}, {"epoch": 2}], "test_loss")
        array([0.5, nan])
    """
    values = np.array(
        [np.nan if record.get(key) is None else float(record[key]) for record in records],
        dtype=np.float64,
    )
    return np.where(np.isfinite(values), values, np.nan)


def best_index(records: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the index of the record with the highest validation accuracy.

    Args:
        records: The lines of ``metrics.jsonl``.

    Returns:
        The index, the earliest among equals; None if no record has a validation accuracy. Test images are
        never used for the choice, as results are reported on them.

    Example:
        >>> best_index([{"validation_accuracy": 0.5}, {"validation_accuracy": 0.75}])
        1
        >>> best_index([{"test_accuracy": 0.5}]) is None
        True
    """
    accuracy = series(records, "validation_accuracy")
    return None if np.isnan(accuracy).all() else int(np.nanargmax(accuracy))


def last_change(records: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the epoch after which the allocation did not change.

    Args:
        records: The lines of ``metrics.jsonl``.

    Returns:
        The last epoch (1-based) whose round closed or re-allocated a channel; None if none did, or if it
        is the last record, so that a later change is still possible.
    """
    changes = np.nan_to_num(series(records, "deallocated"))
    changes = changes + np.nan_to_num(series(records, "reallocated"))
    changed = np.flatnonzero(changes)
    if changed.size == 0 or changed[-1] == len(records) - 1:
        return None
    return int(records[changed[-1]]["epoch"])
