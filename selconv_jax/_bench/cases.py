"""The measured cases of a network: all kinds of training step, re-allocation, evaluation, input."""

import dataclasses
import functools
from collections.abc import Callable

from selconv_jax._bench.workbench import PLAIN, Prepared, Workbench


@dataclasses.dataclass(frozen=True)
class Case:
    """A case to measure."""

    name: str  # in reports; unique for a network
    group: str  # in reports: "training step", "re-allocation", "evaluation" or "input"
    base: str | None  # name of the case that it is compared with; None: none
    rival: str | None  # name of the same case in PyTorch; None: none
    images: int  # images per step, or per call if it makes no steps; 0: none
    prepare: Callable[[], Prepared]  # compiles it and makes the first call
    timed: bool = True  # whether it is timed, not just compiled
    steps: int = 1  # steps per call; times are given per step
    seeds: int = 1  # number of networks that one call trains; times are given per step of one network


def plan_cases(bench: Workbench) -> list[Case]:
    """Plan the requested cases of a network, except those in PyTorch; the base of each is before it."""
    settings, what, batch = bench.settings, set(bench.settings.what), bench.settings.batch
    cases = _step_cases(bench, what)
    if "reallocate" in what:
        cases.append(
            Case("one round, whole network", "re-allocation", PLAIN, None, 0, bench.prepare_reallocate)
        )
    if "eval" in what:
        plain = functools.partial(bench.prepare_eval, bench.plain_network)
        selective_network = functools.partial(bench.selective_network, settings.share)
        selective = functools.partial(bench.prepare_eval, selective_network)
        name = f"eval selective, capacity {settings.share:g}"
        cases.append(Case("eval plain", "evaluation", None, None, batch, plain))
        cases.append(Case(name, "evaluation", "eval plain", None, batch, selective))
    if "input" in what:
        cases.append(Case("gather and augment", "input", None, None, batch, bench.prepare_input))
    return cases


def _step_cases(bench: Workbench, what: set[str]) -> list[Case]:
    settings = bench.settings
    # Everything else is compared with the plain step.
    is_plain_timed = bool(what & {"step", "frozen", "compact", "reallocate"}) or settings.torch
    has_steps = bool(what & {"step", "compile", "memory"})
    if not is_plain_timed and not has_steps:
        return []
    cases = []
    for network in bench.step_networks(what | ({"step"} if has_steps else set())):
        prepare = functools.partial(bench.prepare_step, network.make)
        alone = Case(
            network.name,
            "training step",
            base=None if network.kind == PLAIN else PLAIN,
            rival=torch_name(network.copies) if settings.torch and network.kind != "compact" else None,
            images=settings.batch,
            prepare=prepare,
            timed=is_plain_timed if network.kind == PLAIN else network.kind in what,
            steps=bench.steps,
        )
        cases.append(alone)
        if settings.together and has_steps and network.kind in (PLAIN, "step"):
            together = dataclasses.replace(
                alone,
                name=f"{alone.name}, {settings.together} seeds",
                base=alone.name,
                rival=None,
                prepare=functools.partial(prepare, seeds=settings.together),
                timed="step" in what,
                seeds=settings.together,
            )
            cases.append(together)
    return cases


def torch_name(capacity: float | None) -> str:
    """Name the PyTorch step with a fraction of copies; None: of the plain network."""
    return "torch plain" if capacity is None else f"torch selective, {capacity:g} re-allocated"
