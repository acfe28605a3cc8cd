"""Tables, bars and JSON of steps compiled for a TPU."""

import dataclasses
from typing import Any

from rich.table import Table
from rich.text import Text

from selconv_jax._bench.picture import Bar, Panel
from selconv_jax._bench.report import MEGA, new_table
from selconv_jax._bench.topology import TopologyResult

__all__ = ["costs_table", "cycles_panel", "largest_table", "topology_report"]

_KILO = 1e3
_PLACE_LETTERS = 70


def costs_table(result: TopologyResult, title: str) -> Table:
    """Tabulate estimated cycles and memory of one chip, for every step.

    Args:
        result: The compiled steps.
        title: Of the table.

    Returns:
        A table for ``rich.print``.
    """
    table = new_table(
        title,
        "kilocycles: sum of the compiler's estimates, one chip; MB of one chip: arguments, outputs and "
        "temporary arrays less outputs in place of arguments",
    )
    table.add_column("\ncase", no_wrap=True)
    for heading in ("kilo-\ncycles", "ratio to\nplain", "total\nMB", "temporary\nMB", "ratio to\nplain"):
        table.add_column(heading, justify="right", no_wrap=True)
    for step in result.steps:
        memory = step.memory
        table.add_row(
            Text(step.name),
            f"{step.cycles / _KILO:,.0f}",
            _ratio(step.ratio),
            f"{memory['total'] / MEGA:,.1f}" if memory else "",
            f"{memory['temporary'] / MEGA:,.1f}" if memory else "",
            _ratio(step.memory_ratio),
        )
    return table


def largest_table(result: TopologyResult, title: str) -> Table:
    """Tabulate the most costly operations of every step, and their origins.

    Args:
        result: The compiled steps.
        title: Of the table.

    Returns:
        A table for ``rich.print``.
    """
    table = new_table(title, "most costly operations, and what the largest part of each is")
    table.add_column("case", no_wrap=True)
    table.add_column("kilocycles", justify="right", no_wrap=True)
    table.add_column("operation", no_wrap=True)
    table.add_column("from", no_wrap=True)
    for step in result.steps:
        table.add_section()
        for number, cost in enumerate(step.largest):
            name = step.name if number == 0 else ""
            place = cost.place if len(cost.place) <= _PLACE_LETTERS else f"...{cost.place[-_PLACE_LETTERS:]}"
            table.add_row(Text(name), f"{cost.cycles / _KILO:,.1f}", Text(cost.name), Text(place))
    return table


def cycles_panel(result: TopologyResult, topology: str) -> Panel:
    """Make a panel of the estimated cycles as bars.

    Args:
        result: The compiled steps.
        topology: Its name.

    Returns:
        A panel for `picture.bar_picture`.
    """
    bars = [
        Bar(
            step.name,
            step.cycles / _KILO,
            None,
            None,
            f"{step.cycles / _KILO:,.0f}" + ("" if number == 0 else f"   {_ratio(step.ratio)} x plain"),
        )
        for number, step in enumerate(result.steps)
    ]
    title = f"{result.model}: training step compiled for {topology}"
    return Panel(title, "kilocycles of one chip, estimated by the compiler", bars)


def topology_report(result: TopologyResult) -> dict[str, Any]:
    """Collect all results of a network, ready for JSON: bytes of one chip, seconds."""
    return dataclasses.asdict(result)


def _ratio(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"
