"""Tables, bars and JSON of programs compiled for TPUs."""

import dataclasses
from typing import Any

from rich.table import Table
from rich.text import Text

from selconv_jax._bench.picture import Bar, Panel
from selconv_jax._bench.pod import PodPlan
from selconv_jax._bench.report import MEGA, new_table
from selconv_jax._bench.run import TopologyResult
from selconv_jax._bench.tpu import HOP_SECONDS, CompiledProgram

__all__ = [
    "costs_table",
    "cycles_panel",
    "largest_table",
    "messages_table",
    "pod_table",
    "scaling_line",
    "topology_report",
]

_KILO = 1e3
_PLACE_LETTERS = 70
_TOTAL = "MB of one chip: arguments, outputs and temporary arrays less outputs in place of arguments"


def costs_table(result: TopologyResult, title: str) -> Table:
    """Tabulate the estimated cycles and the memory of one chip, for every step."""
    table = new_table(
        title,
        f"kilocycles: sum of the compiler's estimates, one chip; {_TOTAL}",
        *("\ncase", "kilo-\ncycles", "ratio to\nplain", "total\nMB", "temporary\nMB", "ratio to\nplain"),
    )
    for step in result.steps:
        cycles_ratio, memory_ratio = _ratios(result, step)
        table.add_row(
            Text(step.name),
            f"{step.cycles / _KILO:,.0f}",
            _two_digits(cycles_ratio),
            _megabytes(step, "total"),
            _megabytes(step, "temporary"),
            _two_digits(memory_ratio),
        )
    return table


def largest_table(result: TopologyResult, title: str) -> Table:
    """Tabulate the most costly operations of every step, and their origins."""
    table = new_table(
        title,
        "most costly operations, and what the largest part of each is",
        *("case", "kilocycles", "operation", "from"),
        text=("operation", "from"),
    )
    for step in result.steps:
        table.add_section()
        for number, cost in enumerate(step.largest):
            name = step.name if number == 0 else ""
            place = cost.place if len(cost.place) <= _PLACE_LETTERS else f"...{cost.place[-_PLACE_LETTERS:]}"
            table.add_row(Text(name), f"{cost.cycles / _KILO:,.1f}", Text(cost.name), Text(place))
    return table


def cycles_panel(result: TopologyResult, topology: str) -> Panel:
    """Make a panel of the estimated cycles as bars, for `picture.bar_picture`."""
    bars = []
    for number, step in enumerate(result.steps):
        ratio = f"   {_two_digits(_ratios(result, step)[0])} x plain" if number else ""
        text = f"{step.cycles / _KILO:,.0f}{ratio}"
        bars.append(Bar(step.name, step.cycles / _KILO, None, None, text))
    title = f"{result.model}: training step compiled for {topology}"
    return Panel(title, "kilocycles of one chip, estimated by the compiler", bars)


def topology_report(result: TopologyResult) -> dict[str, Any]:
    """Collect all results of a network, ready for JSON: bytes of one chip, seconds."""
    report = dataclasses.asdict(result)
    for step, program in zip(report["steps"], result.steps, strict=True):
        step["ratio"], step["memory_ratio"] = _ratios(result, program)
    return report


def pod_table(plan: PodPlan, title: str) -> Table:
    """Tabulate the memory against a chip's capacity, the cycles and the compile times of a run."""
    capacity = (
        f"{plan.memory_capacity / MEGA:,.0f} MB of a chip"
        if plan.memory_capacity
        else "a chip's memory, not known"
    )
    table = new_table(
        title,
        f"{_TOTAL}; fits: in the {capacity}; kilocycles: the compiler's estimates for one chip, without "
        "messages",
        *("program", "MB", "fits", "kilocycles", "compiled in s"),
    )
    for program in plan.programs:
        fits = {True: "yes", False: "no", None: "?"}[program.fits]
        cycles = f"{program.cycles / _KILO:,.0f}"
        seconds = f"{program.compile_seconds:,.1f}"
        table.add_row(program.name, _megabytes(program, "total"), fits, cycles, seconds)
    return table


def messages_table(plan: PodPlan) -> Table:
    """Tabulate the collectives of a run by kind."""
    table = new_table(
        "messages between chips",
        "MB of their results on one chip; the gradient of all parameters has "
        f"{plan.gradient_bytes / MEGA:,.3f} MB",
        *("program", "kind", "number", "MB", "largest, MB"),
        text=("kind",),
    )
    for program in plan.programs:
        if not program.messages:
            table.add_row(program.name, "none", "0", "", "")
        for number, kind in enumerate(program.messages):
            sizes = (f"{size / MEGA:,.3f}" for size in (kind.bytes, kind.largest))
            table.add_row(program.name if number == 0 else "", kind.kind, f"{kind.count:,}", *sizes)
    return table


def scaling_line(plan: PodPlan) -> str:
    """Estimate the fraction of a training step spent computing, in a sentence with its assumptions."""
    step = plan.programs[0]
    if plan.micro_batches > 1:
        return "Cycles and messages in the loop over micro-batches do not all count: nothing is estimated."
    if plan.clock is None or step.message_seconds is None or not step.cycles:
        return "The rates of these chips are not known here: nothing is estimated of their messages."
    computing = step.cycles / plan.clock
    share = computing / (computing + step.message_seconds)
    return (
        f"estimate of a training step: {computing * 1e3:.2f} ms computing, "
        f"{step.message_seconds * 1e3:.2f} ms in messages that nothing else overlaps, so {share:.0%} of it "
        f"computing. Assumed: {plan.clock / 1e9:.2f} GHz, links at their "
        "published rate, all-reduces in which each chip sends twice all bytes, "
        f"{HOP_SECONDS * 1e6:g} us for each link that is crossed."
    )


def _ratios(result: TopologyResult, step: CompiledProgram) -> tuple[float | None, float | None]:
    """Return the ratios of a step's cycles and total memory to those of the plain step; None: unknown."""
    plain = result.steps[0]
    memory = step.memory["total"] / plain.memory["total"] if step.memory and plain.memory else None
    return step.cycles / plain.cycles if plain.cycles else None, memory


def _megabytes(program: CompiledProgram, key: str) -> str:
    return f"{program.memory[key] / MEGA:,.1f}" if program.memory else ""


def _two_digits(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"
