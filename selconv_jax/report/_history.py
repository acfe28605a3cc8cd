"""Time series of a run's logged metrics, for the curves and the tables."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selconv_jax.errors import SelconvError

__all__ = ["best_index", "last_change", "require_records", "series"]


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


def best_index(records: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the index of the first record with the highest validation accuracy; None if no record has one.

    Test images are never used for the choice, as results are reported on them.
    """
    accuracy = series(records, "validation_accuracy")
    return None if np.isnan(accuracy).all() else int(np.nanargmax(accuracy))


def last_change(records: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the last epoch (1-based) whose round closed or re-allocated a channel.

    None if none did, or if it is the last record, so that a later change is still possible.
    """
    changes = np.nan_to_num(series(records, "deallocated"))
    changes = changes + np.nan_to_num(series(records, "reallocated"))
    changed = np.flatnonzero(changes)
    if changed.size == 0 or changed[-1] == len(records) - 1:
        return None
    return int(records[changed[-1]]["epoch"])
