"""Runs of several configurations side by side: mean and spread over their seeds."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.markup import escape
from rich.table import Table

from selconv_jax.errors import SelconvError
from selconv_jax.report.records import best_index, require_records, series

__all__ = ["ConfigurationResults", "Spread", "comparison_table", "run_numbers", "spread"]

# key of `run_numbers`, heading, factor, format
_COLUMNS = (
    ("test_accuracy", "test\nacc. %", 100, ".2f"),
    ("test_error", "test\nerror %", 100, ".2f"),
    ("best_test_accuracy", "test at\nbest %", 100, ".2f"),
    ("closed", "\nclosed", 1, ",.1f"),
    ("reallocated", "re-allo-\ncated", 1, ",.1f"),
    ("images_per_second", "images\nper s", 1, ",.0f"),
)


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
class ConfigurationResults:
    """The finished runs of a configuration.

    Attributes:
        name: How tables and pictures call it.
        runs: The lines of ``metrics.jsonl`` of every run, by seed.

    Raises:
        SelconvError: A run has no record, or there is no run.
    """

    name: str
    runs: Mapping[int, Sequence[Mapping[str, Any]]]

    def __post_init__(self) -> None:
        if not self.runs:
            raise SelconvError(f"{self.name} has no finished run, so there is nothing to compare.")
        for records in self.runs.values():
            require_records(records)

    @property
    def summary(self) -> dict[str, Spread]:
        """`Spread` of every number of `run_numbers` that a run has."""
        numbers = [run_numbers(records) for records in self.runs.values()]
        known = {key: [run[key] for run in numbers if run[key] is not None] for key in numbers[0]}
        return {
            key: spread([float(value) for value in values if value is not None])
            for key, values in known.items()
            if values
        }


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation of a sample.

    Args:
        values: At least one finite number.

    Returns:
        Both.

    Example:
        >>> spread([1.0, 3.0])
        Spread(mean=2.0, std=1.4142135623730951, count=2)
    """
    mean = math.fsum(values) / len(values)
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Spread(mean, deviation, len(values))


def run_numbers(records: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """The numbers by which runs are compared; accuracies and errors are fractions in [0, 1].

    Args:
        records: The lines of ``metrics.jsonl``, one per epoch, in order.

    Returns:
        ``test_accuracy``, ``test_error``, ``test_loss`` and ``train_loss`` of the last epoch;
        of runs with validation images, the ``validation_accuracy`` of the last epoch, the ``best_epoch`` by
        validation accuracy and the ``best_test_accuracy``, that epoch's; channels ``closed`` and
        ``reallocated`` by all rounds; ``copies``, ``open_channels`` and ``channels`` at the end; the median
        over the epochs of ``images_per_second``. None where the run has no such number.

    Raises:
        SelconvError: ``records`` is empty.

    Example:
        >>> run_numbers([{"epoch": 1, "test_accuracy": 0.75}])["test_error"]
        0.25
    """
    require_records(records)

    def last(key: str) -> float | None:
        value = float(series(records, key)[-1])
        return None if math.isnan(value) else value

    def over_epochs(key: str, reduce: Any) -> float | None:
        values = series(records, key)
        return None if np.isnan(values).all() else float(reduce(values))

    accuracy, best = last("test_accuracy"), best_index(records)
    return {
        "test_accuracy": accuracy,
        "test_error": None if accuracy is None else 1 - accuracy,
        "test_loss": last("test_loss"),
        "train_loss": last("train_loss"),
        "validation_accuracy": last("validation_accuracy"),
        "best_test_accuracy": None if best is None else float(records[best]["test_accuracy"]),
        "best_epoch": None if best is None else float(records[best]["epoch"]),
        "closed": over_epochs("closed", np.nansum),
        "reallocated": over_epochs("reallocated", np.nansum),
        "copies": last("copies"),
        "open_channels": last("open_channels"),
        "channels": last("channels"),
        "images_per_second": over_epochs("images_per_second", np.nanmedian),
    }


def comparison_table(configurations: Sequence[ConfigurationResults]) -> Table:
    """Mean and, below it, standard deviation over the seeds of every configuration.

    Args:
        configurations: In the order of the rows.

    Returns:
        A table for ``rich.print`` that fits a terminal of 80 characters; a deviation of one run is ``-``.
        The test accuracy at the best epoch has a column where a run has validation images.

    Example:
        >>> results = ConfigurationResults("plain", {0: [{"epoch": 1, "test_accuracy": 0.5}]})
        >>> comparison_table([results]).row_count
        1
    """
    known = {key for configuration in configurations for key in configuration.summary}
    columns = [column for column in _COLUMNS if column[0] != "best_test_accuracy" or column[0] in known]
    note = "\nbest: the epoch of the highest validation accuracy" if "best_epoch" in known else ""
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        caption=f"mean ± standard deviation over the seeds{note}",
        caption_justify="left",
    )
    table.add_column("\nconfiguration", overflow="fold")
    for _, heading, _, _ in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for number, configuration in enumerate(configurations):
        summary = configuration.summary
        cells = []
        for key, _, factor, form in columns:
            value = summary.get(key)
            if value is None:
                cells.append("")
                continue
            deviation = "-" if value.std is None else f"± {factor * value.std:{form}}"
            cells.append(f"{factor * value.mean:{form}}\n{deviation}")
        seeds = f"seed{'s' if len(configuration.runs) > 1 else ''} {', '.join(map(str, configuration.runs))}"
        name = f"{escape(configuration.name)}\n[dim]{seeds}[/dim]"
        table.add_row(name, *cells, end_section=number + 1 < len(configurations))
    return table
