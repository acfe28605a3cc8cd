"""Tables and JSON of a benchmark."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from selconv_jax._bench.rows import Ratio, rows_of
from selconv_jax._bench.run import NetworkResult
from selconv_jax._bench.settings import BenchSettings

_MEMORY = ("arguments", "outputs", "in_place", "temporary", "total", "peak")
MEGA = 1e6  # megabytes are 10^6 bytes here


def new_table(title: str, caption: str, *headings: str, text: Collection[str] = ()) -> Table:
    """Make an empty table in the common style; the first column and those in ``text`` are left-justified."""
    table = Table(
        title=Text(title, "table.title"),
        title_justify="left",
        caption=caption,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for number, heading in enumerate(headings):
        is_text = number == 0 or heading in text
        table.add_column(heading, justify="left" if is_text else "right", no_wrap=True)
    return table


def describe(settings: BenchSettings) -> str:
    """Summarize the settings in one line: batch, images, type, options of the network."""
    height, width, channels = settings.image
    parts = [f"batch {settings.batch}", f"images {height}x{width}x{channels}", settings.dtype]
    parts += [f"{key}={value}" for key, value in settings.options.items()]
    return ", ".join(parts)


def time_table(result: NetworkResult, title: str) -> Table:
    """Tabulate the timed cases of a network: median, quartiles, minimum, speed, ratios."""
    table = new_table(
        title,
        "times in ms per step (of one seed) or call; ratio: of the medians, in brackets the median of the "
        "ratios within each round; to PyTorch: below 1 is faster than it",
        *("\ncase", "\nmedian", "\nquartiles", "\nmin.", "repe-\ntitions", "images\nper s"),
        *("ratio to the base", "ratio to\nPyTorch"),
    )
    group = None
    for row in rows_of(result):
        if row.summary is None:
            continue
        if group not in (None, row.group):
            table.add_section()
        group, summary = row.group, row.summary
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
        f"{row.seeds} seeds together make {1 / row.ratio.medians:.2f} times as many steps per second as one "
        f"after the other ({row.base})"
        for row in rows_of(result)
        if row.seeds > 1 and row.ratio is not None
    ]


def memory_table(result: NetworkResult, title: str) -> Table:
    """Tabulate the memory of the compiled steps of a network."""
    memories = {row.name: (row.memory, row.memory_ratio) for row in rows_of(result) if row.memory}
    keys = [key for key in _MEMORY if any(key in memory for memory, _ in memories.values())]
    table = new_table(
        title,
        "MB; total: arguments, outputs and temporary arrays less outputs in place of arguments",
        *("case", *(key.replace("_", " ") for key in keys), "total, ratio"),
    )
    for name, (memory, ratio) in memories.items():
        numbers = [f"{memory[key] / MEGA:,.1f}" if key in memory else "" for key in keys]
        table.add_row(Text(name), *numbers, "" if ratio is None else f"{ratio:.2f}")
    return table


def compile_table(result: NetworkResult, title: str) -> Table:
    """Tabulate the times of tracing and compiling, without a compilation cache."""
    caption = "seconds, once each; the first program also traces what the others share"
    table = new_table(title, caption, "case", "tracing", "compiling", "both")
    for row in rows_of(result):
        if row.compile is not None:
            seconds = (*row.compile.values(), sum(row.compile.values()))
            table.add_row(Text(row.name), *(f"{each:.2f}" for each in seconds))
    return table


def report_of(
    settings: BenchSettings, environment: Mapping[str, Any], results: Sequence[NetworkResult]
) -> dict[str, Any]:
    """Collect all results, ready for JSON: times in seconds, memory in bytes.

    Every network has its ``cases`` (see `Row`) and ``rounds`` (seconds by case, in the order of turns).
    """
    without = {} if "compile" in settings.what else {"compile": None}
    return {
        "settings": dataclasses.asdict(settings),
        "environment": dict(environment),
        "networks": [
            {
                "model": result.model,
                "complete": result.complete,
                "notes": list(result.notes),
                "cases": [dataclasses.asdict(row) | without for row in rows_of(result)],
                "rounds": [dict(seconds) for seconds in result.rounds],
            }
            for result in results
        ],
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
    """Format a ratio with two decimals, or four if it is below 0.1."""
    return f"{ratio:.{2 if ratio >= 0.1 else 4}f}"
