"""Tables and JSON of a benchmark."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from selconv_jax._bench.rows import Ratio, Row, rows_of
from selconv_jax._bench.run import NetworkResult
from selconv_jax._bench.settings import BenchSettings

__all__ = [
    "MEGA",
    "compile_table",
    "describe",
    "gains",
    "memory_table",
    "new_table",
    "ratio_text",
    "report_of",
    "time_table",
]

_MEMORY = ("arguments", "outputs", "in_place", "temporary", "total", "peak")
MEGA = 1e6  # megabytes are 10^6 bytes here


def new_table(title: str, caption: str) -> Table:
    """Make an empty table in the common style."""
    return Table(
        title=Text(title, "table.title"),
        title_justify="left",
        caption=caption,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )


def describe(settings: BenchSettings) -> str:
    """Summarize the settings in one line: batch, images, type, options of the network."""
    height, width, channels = settings.image
    parts = [f"batch {settings.batch}", f"images {height}x{width}x{channels}", settings.dtype]
    parts += [f"{key}={value}" for key, value in settings.options.items()]
    return ", ".join(parts)


def time_table(result: NetworkResult, title: str) -> Table:
    """Tabulate the timed cases of a network: median, quartiles, minimum, speed, ratios.

    Args:
        result: The measurements.
        title: Of the table.

    Returns:
        A table for ``rich.print``; a case without repetitions has no row.
    """
    table = new_table(
        title,
        "times in ms per step (of one seed) or call; ratio: of the medians, in brackets the median of the "
        "ratios within each round; to PyTorch: below 1 is faster than it",
    )
    table.add_column("\ncase", no_wrap=True)
    headings = ("\nmedian", "\nquartiles", "\nmin.", "repe-\ntitions", "images\nper s", "ratio to the base")
    for heading in (*headings, "ratio to\nPyTorch"):
        table.add_column(heading, justify="right", no_wrap=True)
    group = None
    for row in rows_of(result):
        if row.summary is None:
            continue
        if group not in (None, row.group):
            table.add_section()
        group = row.group
        summary = row.summary
        table.add_row(
            Text(row.name),
            _ms(summary.median),
            f"{_ms(summary.low)} - {_ms(summary.high)}",
            _ms(summary.minimum),
            str(summary.count),
            "" if row.images_per_second is None else f"{row.images_per_second:,.0f}",
            _ratio(row.ratio),
            _ratio(row.torch_ratio),
        )
    return table


def gains(result: NetworkResult) -> list[str]:
    """Describe the gain of training seeds together, in a sentence for each such case that was timed."""
    return [
        f"{row.measured.case.seeds} seeds together make {1 / row.ratio.medians:.2f} times as many steps per "
        f"second as one after the other ({row.measured.case.base})"
        for row in rows_of(result)
        if row.measured.case.seeds > 1 and row.ratio is not None
    ]


def memory_table(result: NetworkResult, title: str) -> Table:
    """Tabulate the memory of the compiled steps of a network.

    Args:
        result: The measurements.
        title: Of the table.

    Returns:
        A table for ``rich.print``, in megabytes (10^6 bytes).
    """
    table = new_table(
        title, "MB; total: arguments, outputs and temporary arrays less outputs in place of arguments"
    )
    rows = [row for row in rows_of(result) if row.measured.memory is not None]
    keys = [key for key in _MEMORY if any(key in (row.measured.memory or {}) for row in rows)]
    table.add_column("case", no_wrap=True)
    for heading in (*(key.replace("_", " ") for key in keys), "total, ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        memory = row.measured.memory or {}
        numbers = [f"{memory[key] / MEGA:,.1f}" if key in memory else "" for key in keys]
        table.add_row(Text(row.name), *numbers, "" if row.memory_ratio is None else f"{row.memory_ratio:.2f}")
    return table


def compile_table(result: NetworkResult, title: str) -> Table:
    """Tabulate the times of tracing and compiling, once each, without a compilation cache.

    Args:
        result: The measurements.
        title: Of the table.

    Returns:
        A table for ``rich.print``, in seconds.
    """
    table = new_table(title, "seconds, once each; the first program also traces what the others share")
    table.add_column("case", no_wrap=True)
    for heading in ("tracing", "compiling", "both"):
        table.add_column(heading, justify="right", no_wrap=True)
    for measured in result.cases:
        lower, compiled = measured.lower_seconds, measured.compile_seconds
        if lower is None or compiled is None:
            continue
        table.add_row(Text(measured.case.name), f"{lower:.2f}", f"{compiled:.2f}", f"{lower + compiled:.2f}")
    return table


def report_of(
    settings: BenchSettings, environment: Mapping[str, Any], results: Sequence[NetworkResult]
) -> dict[str, Any]:
    """Collect all results, ready for JSON: times in seconds, memory in bytes.

    Args:
        settings: The benchmark.
        environment: From `environment.environment`.
        results: One per network.

    Returns:
        ``settings``, ``environment``, and ``networks``, each with its ``cases`` (all repetitions, their
        summary, ratios, memory, time of compiling) and ``rounds`` (seconds by case, in the order of turns).
    """
    return {
        "settings": dataclasses.asdict(settings),
        "environment": dict(environment),
        "networks": [
            {
                "model": result.model,
                "complete": result.complete,
                "notes": list(result.notes),
                "cases": [_case_report(row, "compile" in settings.what) for row in rows_of(result)],
                "rounds": [dict(seconds) for seconds in result.rounds],
            }
            for result in results
        ],
    }


def _case_report(row: Row, with_compile: bool) -> dict[str, Any]:
    measured = row.measured
    compiled = {"tracing": measured.lower_seconds, "compiling": measured.compile_seconds}
    known = with_compile and measured.compile_seconds is not None
    return {
        "name": row.name,
        "group": row.group,
        "base": measured.case.base,
        "images": measured.case.images,
        "steps_per_call": measured.case.steps,
        "seeds": measured.case.seeds,
        "summary": None if row.summary is None else dataclasses.asdict(row.summary),
        "images_per_second": row.images_per_second,
        "ratio": None if row.ratio is None else dataclasses.asdict(row.ratio),
        "torch_ratio": None if row.torch_ratio is None else dataclasses.asdict(row.torch_ratio),
        "compile": compiled if known else None,
        "memory": measured.memory,
        "memory_ratio": row.memory_ratio,
        "seconds": list(row.seconds),
    }


def _ms(seconds: float) -> str:
    milliseconds = 1e3 * seconds
    return f"{milliseconds:,.{0 if milliseconds >= 1000 else 1 if milliseconds >= 10 else 3}f}"


def _ratio(ratio: Ratio | None) -> str:
    if ratio is None:
        return ""
    paired = "" if ratio.paired is None else f" ({ratio_text(ratio.paired)})"
    return f"{ratio_text(ratio.medians)}{paired}"


def ratio_text(ratio: float) -> str:
    """Format a ratio with two significant digits, also if it is small."""
    return f"{ratio:.{2 if ratio >= 0.1 else 4}f}"
