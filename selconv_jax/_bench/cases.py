"""The measured cases of a network: all kinds of training step, re-allocation, evaluation, input."""

import dataclasses
import functools
from collections.abc import Callable

from selconv_jax._bench.states import without_allocation
from selconv_jax._bench.workbench import Prepared, Workbench

__all__ = ["PLAIN", "Case", "plan_cases", "step_name", "torch_name"]

PLAIN = "plain"


@dataclasses.dataclass(frozen=True)
class Case:
    """A case to measure.

    Attributes:
        name: In reports; unique for a network.
        group: What reports put it under: ``"training step"``, ``"re-allocation"``, ``"evaluation"``,
            ``"input"``.
        base: Name of the case that it is compared with; None: none.
        rival: Name of the same case in PyTorch; None: none.
        images: Images per step, or per call if it makes no steps; 0: none.
        prepare: Compiles it and makes the first call.
        timed: Whether it is timed, not just compiled.
        steps: Steps per call; times are given per step.
        seeds: Number of networks that one call trains; times are given per step of one network.
    """

    name: str
    group: str
    base: str | None
    rival: str | None
    images: int
    prepare: Callable[[], Prepared]
    timed: bool = True
    steps: int = 1
    seeds: int = 1


def step_name(capacity: float) -> str:
    """Name the step of a selective network with a capacity for copies."""
    return f"selective, capacity {capacity:g}"


def plan_cases(bench: Workbench) -> list[Case]:
    """Plan the requested cases of a network, except those in PyTorch.

    Args:
        bench: The network.

    Returns:
        The cases, the base of each before it.
    """
    settings = bench.settings
    what, batch, share, seeds = set(settings.what), settings.batch, settings.share, settings.together
    timed = "step" in what
    group = "training step"
    cases = []
    # Everything else is compared with the plain step.
    timed_base = bool(what & {"step", "frozen", "compact", "reallocate"}) or settings.torch
    if timed_base or what & {"compile", "memory"}:
        rival = torch_name(None) if settings.torch else None
        plain = Case(PLAIN, group, None, rival, batch, bench.prepare_plain, timed_base, bench.steps)
        cases.append(plain)
    if what & {"step", "compile", "memory"}:
        if seeds:
            cases.append(_together(plain, functools.partial(bench.prepare_plain, seeds), timed, seeds))
        for capacity in settings.capacity:
            rival = torch_name(capacity) if settings.torch else None
            prepare = functools.partial(bench.prepare_capacity, capacity)
            cases.append(Case(step_name(capacity), group, PLAIN, rival, batch, prepare, timed, bench.steps))
            if seeds:
                prepare = functools.partial(bench.prepare_capacity, capacity, seeds)
                cases.append(_together(cases[-1], prepare, timed, seeds))
    if "frozen" in what:
        rival = torch_name(share) if settings.torch else None
        name = f"frozen, {share:g} re-allocated"
        cases.append(Case(name, group, PLAIN, rival, batch, bench.prepare_frozen, steps=bench.steps))
    if "compact" in what:
        name = f"compact, {share:g} closed"
        cases.append(Case(name, group, PLAIN, None, batch, bench.prepare_compact, steps=bench.steps))
    if "reallocate" in what:
        cases.append(
            Case("one round, whole network", "re-allocation", PLAIN, None, 0, bench.prepare_reallocate)
        )
    if "eval" in what:
        cases += _eval_cases(bench)
    if "input" in what:
        cases.append(Case("gather and augment", "input", None, None, batch, bench.prepare_input))
    return cases


def _together(alone: Case, prepare: Callable[[], Prepared], timed: bool, seeds: int) -> Case:
    """Derive the case that makes the same steps for several networks in one program."""
    name = f"{alone.name}, {seeds} seeds"
    return dataclasses.replace(
        alone, name=name, base=alone.name, rival=None, prepare=prepare, timed=timed, seeds=seeds
    )


def torch_name(capacity: float | None) -> str:
    """Name the PyTorch step with a fraction of copies; None: of the plain network."""
    return "torch plain" if capacity is None else f"torch selective, {capacity:g} re-allocated"


def _eval_cases(bench: Workbench) -> list[Case]:
    share, batch, group = bench.settings.share, bench.settings.batch, "evaluation"

    def prepare_plain() -> Prepared:
        return bench.prepare_eval(bench.plain, without_allocation(bench.initial.variables))

    def prepare_selective() -> Prepared:
        return bench.prepare_eval(bench.selective.clone(capacity=share), bench.copied(share))

    return [
        Case("eval plain", group, None, None, batch, prepare_plain),
        Case(f"eval selective, capacity {share:g}", group, "eval plain", None, batch, prepare_selective),
    ]
