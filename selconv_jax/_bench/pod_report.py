"""Tables of a run compiled for a TPU pod."""

from rich.table import Table

from selconv_jax._bench.pod import HOP_SECONDS, PodPlan
from selconv_jax._bench.report import MEGA, new_table

__all__ = ["messages_table", "pod_table", "scaling_line"]

_KILO = 1e3


def pod_table(plan: PodPlan, title: str) -> Table:
    """Tabulate memory against a chip's capacity, cycles and compile time.

    Args:
        plan: The compiled run.
        title: Of the table.

    Returns:
        A table for ``rich.print``.
    """
    capacity = (
        f"{plan.memory_capacity / MEGA:,.0f} MB of a chip"
        if plan.memory_capacity
        else "a chip's memory, not known"
    )
    table = new_table(
        title,
        "MB of one chip: arguments, outputs and temporary arrays less outputs in place of arguments; fits: "
        f"in the {capacity}; kilocycles: the compiler's estimates for one chip, without messages",
    )
    table.add_column("program", no_wrap=True)
    for heading in ("MB", "fits", "kilocycles", "compiled in s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for program in plan.programs:
        fits = {True: "yes", False: "no", None: "?"}[program.fits]
        memory = f"{program.memory['total'] / MEGA:,.1f}" if program.memory else ""
        table.add_row(
            program.name, memory, fits, f"{program.cycles / _KILO:,.0f}", f"{program.compile_seconds:,.1f}"
        )
    return table


def messages_table(plan: PodPlan) -> Table:
    """Tabulate the collectives by kind.

    Args:
        plan: The compiled run.

    Returns:
        A table for ``rich.print``.
    """
    table = new_table(
        "messages between chips",
        "MB of their results on one chip; the gradient of all parameters has "
        f"{plan.gradient_bytes / MEGA:,.3f} MB",
    )
    table.add_column("program", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    for heading in ("number", "MB", "largest, MB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for program in plan.programs:
        if not program.messages:
            table.add_row(program.name, "none", "0", "", "")
        for number, kind in enumerate(program.messages):
            table.add_row(
                program.name if number == 0 else "",
                kind.kind,
                f"{kind.count:,}",
                f"{kind.bytes / MEGA:,.3f}",
                f"{kind.largest / MEGA:,.3f}",
            )
    return table


def scaling_line(plan: PodPlan) -> str:
    """Estimate the fraction of a training step that is spent computing.

    Args:
        plan: The compiled run.

    Returns:
        A sentence, with its assumptions.
    """
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
