"""Read what a run logged, one record per epoch, as series; shared by the curves and the tables."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selconv_jax.errors import SelconvError

__all__ = ["best_index", "last_change", "require_records", "series"]


def require_records(records: Sequence[Mapping[str, Any]]) -> None:
    """Refuse an empty log.

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
    """One logged quantity over the epochs.

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
    """The position of the record with the highest accuracy on the validation images.

    Args:
        records: The lines of ``metrics.jsonl``.

    Returns:
        Its index, the earliest of equals; None if no record has a validation accuracy: the test images must
        not choose what is then reported on them.

    Example:
        >>> best_index([{"validation_accuracy": 0.5}, {"validation_accuracy": 0.75}])
        1
        >>> best_index([{"test_accuracy": 0.5}]) is None
        True
    """
    accuracy = series(records, "validation_accuracy")
    return None if np.isnan(accuracy).all() else int(np.nanargmax(accuracy))


def last_change(records: Sequence[Mapping[str, Any]]) -> int | None:
    """The epoch after which the allocation stayed as it was.

    Args:
        records: The lines of ``metrics.jsonl``.

    Returns:
        The last epoch (1-based) whose round closed or re-allocated a channel; None if none did, or
        if no epoch was recorded after it, so that nothing is known yet about its being the last.
    """
    changes = np.nan_to_num(series(records, "deallocated"))
    changes = changes + np.nan_to_num(series(records, "reallocated"))
    changed = np.flatnonzero(changes)
    if changed.size == 0 or changed[-1] == len(records) - 1:
        return None
    return int(records[changed[-1]]["epoch"])
