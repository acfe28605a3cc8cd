"""Comparison of configurations: mean and spread over the seeds of their runs, and differences by seed."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from selconv_jax.errors import SelconvError
from selconv_jax.report._statistics import (
    PairedDifference,
    Spread,
    best_index,
    is_complete,
    paired_difference,
    require_records,
    series,
    spread,
)

MARK = "*"  # of a difference whose interval excludes 0

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
    """The finished runs of a configuration, and the seeds of those that failed.

    Attributes:
        name: Its name in tables and pictures.
        runs: The lines of ``metrics.jsonl`` of every run, by seed.
        failed: Seeds of failed runs, which are listed but excluded from all statistics.
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
        """Values of each number of `run_numbers` by seed, as far as runs have it."""
        known: dict[str, dict[int, float]] = {}
        for seed, records in self.runs.items():
            for key, value in run_numbers(records).items():
                if value is not None:
                    known.setdefault(key, {})[seed] = value
        return known

    @property
    def summary(self) -> dict[str, Spread]:
        """Spread over the seeds of each number of `run_numbers` that some run has."""
        return {key: spread(list(values.values())) for key, values in self.by_seed.items()}


def run_numbers(records: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Compute the numbers by which runs are compared, from the lines of ``metrics.jsonl``.

    Accuracies and errors are fractions in [0, 1], of the last epoch; ``best_epoch`` is that of the highest
    validation accuracy, and ``best_test_accuracy`` the test accuracy of that epoch. Channels ``deallocated``
    and ``reallocated`` are those of all rounds; ``images_per_second`` is the median of the epochs. A number
    that the run does not have, or that needs an epoch whose record is missing, is None.

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

    accuracy, best, complete = last("test_accuracy"), best_index(records), is_complete(records)
    return {
        "test_accuracy": accuracy,
        "test_error": None if accuracy is None else 1 - accuracy,
        "test_loss": last("test_loss"),
        "train_loss": last("train_loss"),
        "validation_accuracy": last("validation_accuracy"),
        "best_test_accuracy": None if best is None else float(records[best]["test_accuracy"]),
        "best_epoch": None if best is None else float(records[best]["epoch"]),
        "deallocated": over_epochs("deallocated", np.nansum) if complete else None,
        "reallocated": over_epochs("reallocated", np.nansum) if complete else None,
        "copies": last("copies"),
        "open_channels": last("open_channels"),
        "channels": last("channels"),
        "images_per_second": over_epochs("images_per_second", np.nanmedian),
    }


def comparison_table(configurations: Sequence[ConfigurationResults]) -> Table:
    """Tabulate the mean and standard deviation over the seeds of every configuration, in 80 characters.

    The deviation of a single run is ``-``. The test accuracy at the best epoch has a column if some run has
    validation images.
    """
    known = {key for configuration in configurations for key in configuration.summary}
    columns = [column for column in _COLUMNS if column[0] != "best_test_accuracy" or column[0] in known]
    note = "\nbest: the epoch of the highest validation accuracy" if "best_epoch" in known else ""
    table = _table("\nconfiguration", [heading for _, heading, _, _ in columns])
    table.caption = f"mean ± standard deviation over the seeds{note}"
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


def number_differences(
    configuration: ConfigurationResults, baseline: ConfigurationResults
) -> dict[str, PairedDifference]:
    """Compute the differences of those numbers of `run_numbers` that both have for some common seed."""
    here, there = configuration.by_seed, baseline.by_seed
    return {
        key: paired_difference(here[key], there[key])
        for key in here
        if key in there and here[key].keys() & there[key].keys()
    }


def difference_table(configurations: Sequence[ConfigurationResults]) -> Table:
    """Tabulate the differences of the test errors to that of the first configuration, in 80 characters.

    A difference whose interval excludes 0 has a star; a single pair has no standard error and interval, and
    equal differences have no interval.
    """
    first, *others = configurations
    table = _table("configuration", ["difference", "standard\nerror", "95% interval", "", "pairs"])
    differences = [number_differences(other, first).get("test_error") for other in others]
    for other, difference in zip(others, differences, strict=True):
        table.add_row(Text(other.name), *_cells(difference))
    note = _note([difference for difference in differences if difference is not None])
    text = f"Test error minus that of {first.name}, in percentage points, paired by seed. {note}"
    table.caption = Text(text, "table.caption")
    return table


def _note(differences: Sequence[PairedDifference]) -> str:
    """Say what the intervals tell, and why there is none."""
    notes = []
    if any(difference.excludes_zero for difference in differences):
        notes = [f"{MARK} The interval excludes 0. Of 20 comparisons without any effect, one does."]
    elif any(difference.interval for difference in differences):
        notes = ["No interval excludes 0: no difference is larger than chance explains."]
    elif not differences:
        notes = ["There are no pairs: no seed is common."]
    elif all(difference.count == 1 for difference in differences):
        notes = ["Of a single pair nothing can be said."]
    if any(difference.std_error == 0 for difference in differences):
        notes.append("Where all pairs differ by the same, there is no interval: chance cannot be estimated.")
    return " ".join(notes)


def _cells(difference: PairedDifference | None) -> tuple[str, ...]:
    if difference is None:
        return "-", "-", "-", "", "0"
    mean, count = f"{100 * difference.mean:+.2f}", str(difference.count)
    error = "-" if difference.std_error is None else f"{100 * difference.std_error:.2f}"
    if difference.interval is None:
        return mean, error, "-", "", count
    low, high = (100 * end for end in difference.interval)
    mark = MARK if difference.excludes_zero else ""
    return mean, error, f"{low:+.2f} to {high:+.2f}", mark, count


def _table(first: str, headings: Sequence[str]) -> Table:
    """Create an empty table of a column of names and columns of numbers, without lines around it."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption_justify="left")
    table.add_column(first, overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table
