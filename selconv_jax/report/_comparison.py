"""Runs of several configurations side by side: mean and spread over their seeds."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from selconv_jax.errors import SelconvError
from selconv_jax.report._history import best_index, require_records, series
from selconv_jax.report._statistics import Spread, spread

__all__ = ["ConfigurationResults", "comparison_table", "run_numbers"]

# key of `run_numbers`, heading, factor, format
_COLUMNS = (
    ("test_accuracy", "test\nacc. %", 100, ".2f"),
    ("test_error", "test\nerror %", 100, ".2f"),
    ("best_test_accuracy", "test at\nbest %", 100, ".2f"),
    ("deallocated", "\nclosed", 1, ",.1f"),
    ("reallocated", "re-allo-\ncated", 1, ",.1f"),
    ("images_per_second", "images\nper s", 1, ",.0f"),
)


@dataclasses.dataclass(frozen=True)
class ConfigurationResults:
    """The finished runs of a configuration, and which have failed.

    Attributes:
        name: How tables and pictures call it.
        runs: The lines of ``metrics.jsonl`` of every run, by seed.
        failed: Seeds whose runs have failed; they are named, and are part of no number.

    Raises:
        SelconvError: A run has no record, or there is no run, not even one that has failed.
    """

    name: str
    runs: Mapping[int, Sequence[Mapping[str, Any]]]
    failed: Sequence[int] = ()

    def __post_init__(self) -> None:
        if not self.runs and not self.failed:
            raise SelconvError(f"{self.name} has no finished run, so there is nothing to compare.")
        for records in self.runs.values():
            require_records(records)

    @property
    def by_seed(self) -> dict[str, dict[int, float]]:
        """Every number of `run_numbers` that some run has, by seed."""
        numbers = {seed: run_numbers(records) for seed, records in self.runs.items()}
        known: dict[str, dict[int, float]] = {}
        for seed, run in numbers.items():
            for key, value in run.items():
                if value is not None:
                    known.setdefault(key, {})[seed] = value
        return known

    @property
    def summary(self) -> dict[str, Spread]:
        """`Spread` of every number of `run_numbers` that a run has."""
        return {key: spread(list(values.values())) for key, values in self.by_seed.items()}


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
        "deallocated": over_epochs("deallocated", np.nansum),
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
        parts = [_seeds(list(configuration.runs))] if configuration.runs else []
        parts += [f"failed: {_seeds(configuration.failed)}"] if configuration.failed else []
        name = Text.assemble(configuration.name, "\n", ("; ".join(parts), "dim"))
        table.add_row(name, *cells, end_section=number + 1 < len(configurations))
    return table


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
