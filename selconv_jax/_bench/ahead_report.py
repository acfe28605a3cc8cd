"""Tables of programs compiled ahead of time."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from selconv_jax._bench.ahead import HOP_SECONDS, CompiledProgram
from selconv_jax._bench.report import MEGA, new_table
from selconv_jax._bench.run_ahead import RunPlan

_KILO = 1e3
_PLACE_LETTERS = 70
_TOTAL = "MB of one chip: arguments, outputs and temporary arrays less outputs in place of arguments"
_CYCLES = "kilocycles: sum of the compiler's estimates, one chip, without messages"
_KERNELS = (
    "kernels: launched by one chip; MB moved: all that they read and write, whole operands; neither has what "
    "cuDNN does inside"
)


def steps_table(steps: Sequence[CompiledProgram], title: str) -> Table:
    """Tabulate the costs and the memory of one chip for training steps, and ratios to the first of them."""
    is_gpu = steps[0].kernels is not None
    costs = ("kernels", "ratio to\nplain", "MB\nmoved") if is_gpu else ("kilo-\ncycles",)
    table = new_table(
        title,
        f"{_KERNELS if is_gpu else _CYCLES}; {_TOTAL}",
        *("\ncase", *costs, "ratio to\nplain", "total\nMB", "temporary\nMB", "ratio to\nplain"),
    )
    for step in steps:
        kernels = (f"{step.kernels:,}", _ratio(step.kernels, steps[0].kernels)) if is_gpu else ()
        table.add_row(
            Text(step.name),
            *kernels,
            _cost(step),
            _ratio(step.cost, steps[0].cost),
            _megabytes(step, "total"),
            _megabytes(step, "temporary"),
            _ratio(_temporary(step), _temporary(steps[0])),
        )
    return table


def largest_table(steps: Sequence[CompiledProgram], title: str) -> Table:
    """Tabulate the most costly operations of every step, and their origins."""
    table = new_table(
        title,
        "most costly operations, and what the largest part of each is",
        *("case", _unit(steps[0]), "operation", "from"),
        text=("operation", "from"),
    )
    for step in steps:
        table.add_section()
        for number, operation in enumerate(step.largest):
            place = operation.place
            if len(place) > _PLACE_LETTERS:
                place = f"...{place[-_PLACE_LETTERS:]}"
            cost = f"{operation.cost / (_KILO if step.kernels is None else MEGA):,.1f}"
            table.add_row(Text("" if number else step.name), cost, Text(operation.name), Text(place))
    return table


def plan_table(plan: RunPlan, title: str) -> Table:
    """Tabulate the memory against a chip's capacity, the costs and the compile times of a run."""
    is_gpu = plan.programs[0].kernels is not None
    capacity = "a chip's memory, not known"
    if plan.memory_capacity:
        capacity = f"{plan.memory_capacity / MEGA:,.0f} MB of a chip"
    table = new_table(
        title,
        f"{_TOTAL}; fits: in the {capacity}; {_KERNELS if is_gpu else _CYCLES}",
        *(
            "program",
            "MB",
            "fits",
            *(("kernels",) if is_gpu else ()),
            _unit(plan.programs[0]),
            "compiled in s",
        ),
    )
    for program in plan.programs:
        fits = {True: "yes", False: "no", None: "?"}[program.fits]
        kernels = (f"{program.kernels:,}",) if is_gpu else ()
        seconds = f"{program.compile_seconds:,.1f}"
        table.add_row(program.name, _megabytes(program, "total"), fits, *kernels, _cost(program), seconds)
    return table


def messages_table(plan: RunPlan) -> Table:
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


def scaling_line(plan: RunPlan) -> str:
    """Estimate the fraction of a training step spent computing, in a sentence with its assumptions."""
    step = plan.programs[0]
    if plan.micro_batches > 1:
        return "Costs and messages in the loop over micro-batches do not all count: nothing is estimated."
    if plan.clock is None or step.message_seconds is None or not step.cost:
        return "The rates of these chips are not known here: no times are estimated."
    computing = step.cost / plan.clock
    share = computing / (computing + step.message_seconds)
    return (
        f"estimate of a training step: {computing * 1e3:.2f} ms computing, "
        f"{step.message_seconds * 1e3:.2f} ms in messages that nothing else overlaps, so {share:.0%} of it "
        f"computing. Assumed: {plan.clock / 1e9:.2f} GHz, links at their "
        "published rate, all-reduces in which each chip sends twice all bytes, "
        f"{HOP_SECONDS * 1e6:g} us for each link that is crossed."
    )


def _unit(program: CompiledProgram) -> str:
    return "kilocycles" if program.kernels is None else "MB moved"


def _cost(program: CompiledProgram) -> str:
    return f"{program.cost / (_KILO if program.kernels is None else MEGA):,.0f}"


def _temporary(program: CompiledProgram) -> int | None:
    return program.memory["temporary"] if program.memory else None


def _ratio(value: float | None, base: float | None) -> str:
    return f"{value / base:.2f}" if value is not None and base else ""


def _megabytes(program: CompiledProgram, key: str) -> str:
    return f"{program.memory[key] / MEGA:,.1f}" if program.memory else ""
