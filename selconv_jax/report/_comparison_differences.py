"""Differences between configurations, paired by seed, with their intervals."""

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from selconv_jax.report._comparison import ConfigurationResults
from selconv_jax.report._statistics import PairedDifference, paired_difference

__all__ = ["MARK", "difference_table", "number_differences"]

MARK = "*"  # of a difference whose interval excludes 0


def number_differences(
    configuration: ConfigurationResults, baseline: ConfigurationResults
) -> dict[str, PairedDifference]:
    """Compute the difference of each number of `run_numbers` that both have for some common seed.

    Args:
        configuration: The runs to compare.
        baseline: The runs to compare them with.

    Returns:
        Configuration minus baseline, by name of the number.

    Example:
        >>> runs = {seed: [{"epoch": 1, "test_accuracy": 0.5 + seed / 8}] for seed in (0, 1)}
        >>> plain = ConfigurationResults("plain", runs)
        >>> number_differences(plain, plain)["test_error"].interval
        (0.0, 0.0)
    """
    here, there = configuration.by_seed, baseline.by_seed
    return {
        key: paired_difference(here[key], there[key])
        for key in here
        if key in there and here[key].keys() & there[key].keys()
    }


def difference_table(configurations: Sequence[ConfigurationResults]) -> Table:
    """Tabulate the difference of every configuration's test error to the first one's, with its interval.

    Args:
        configurations: In the order of the rows; the first is the baseline.

    Returns:
        A table for ``rich.print`` that fits a terminal of 80 characters. A difference whose interval
        excludes 0 has a star; a single pair has no standard error and interval.

    Example:
        >>> runs = {seed: [{"epoch": 1, "test_accuracy": 0.5}] for seed in (0, 1)}
        >>> difference_table([ConfigurationResults(name, runs) for name in ("plain", "selective")]).row_count
        1
    """
    first, *others = configurations
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        caption_justify="left",
    )
    table.add_column("configuration", overflow="fold")
    for heading in ("difference", "standard\nerror", "95% interval", "", "pairs"):
        table.add_column(heading, justify="right", no_wrap=True)
    differences = [number_differences(other, first).get("test_error") for other in others]
    for other, difference in zip(others, differences, strict=True):
        table.add_row(Text(other.name), *_cells(difference))
    known = [difference for difference in differences if difference is not None]
    note = "Of a single pair nothing can be said."
    if any(difference.excludes_zero for difference in known):
        note = f"{MARK} The interval excludes 0. Of 20 comparisons without any effect, one does."
    elif any(difference.interval for difference in known):
        note = "No interval excludes 0: no difference is larger than chance explains."
    text = f"Test error minus that of {first.name}, in percentage points, paired by seed. {note}"
    table.caption = Text(text, "table.caption")
    return table


def _cells(difference: PairedDifference | None) -> tuple[str, ...]:
    if difference is None:
        return "-", "-", "-", "", "0"
    mean, count = f"{100 * difference.mean:+.2f}", str(difference.count)
    if difference.interval is None or difference.std_error is None:
        return mean, "-", "-", "", count
    low, high = (100 * end for end in difference.interval)
    mark = MARK if difference.excludes_zero else ""
    return mean, f"{100 * difference.std_error:.2f}", f"{low:+.2f} to {high:+.2f}", mark, count
