"""Benchmark of one network: all cases are compiled and warmed up first, then timed in turns."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

from selconv_jax._bench.cases import Case, plan_cases
from selconv_jax._bench.measure import Round, take_rounds
from selconv_jax._bench.settings import BenchSettings
from selconv_jax._bench.torch_baseline import load_torch_baseline
from selconv_jax._bench.workbench import Prepared, Workbench

__all__ = ["Listener", "Measured", "NetworkResult", "bench_network", "measure"]


class Listener(Protocol):
    """Listener to the progress of a benchmark."""

    def preparing(self, number: int, count: int, name: str) -> None:
        """Handle that a case, counted from 0, is about to be compiled."""

    def turn(self, number: int, count: int, name: str) -> None:
        """Handle that a case is about to be timed, in a round counted from 0."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """A compiled case.

    Attributes:
        case: The case.
        lower_seconds: See `compilation.Program`; None: unknown.
        compile_seconds: See `compilation.Program`.
        memory: See `compilation.memory_of`.
    """

    case: Case
    lower_seconds: float | None = None
    compile_seconds: float | None = None
    memory: dict[str, int] | None = None


@dataclasses.dataclass(frozen=True)
class NetworkResult:
    """Results of the benchmark of a network.

    Attributes:
        model: Its name.
        cases: Those that were compiled.
        rounds: Seconds of the timed cases, per step if a call makes several.
        complete: False if the benchmark was stopped early.
        notes: Remarks for the reader, such as omitted cases.
    """

    model: str
    cases: Sequence[Measured]
    rounds: Sequence[Round]
    complete: bool
    notes: Sequence[str] = ()


def bench_network(
    model: str, settings: BenchSettings, listener: Listener, should_stop: Callable[[], bool]
) -> NetworkResult:
    """Make all measurements of a network.

    Args:
        model: Its name.
        settings: The benchmark.
        listener: Informed of the progress.
        should_stop: Called between compilations and calls; when true, the measurements so far are returned.

    Returns:
        The measurements.
    """
    bench = Workbench(model, settings)
    cases, notes = plan_cases(bench), []
    if settings.torch:
        baseline = load_torch_baseline()
        # After our training steps, before the cases that are not steps.
        at = sum(case.group == cases[0].group for case in cases)
        cases[at:at] = baseline.plan_torch_cases(bench)
        notes.append(baseline.TORCH_NOTE)
    measured, rounds, complete = measure(cases, settings.repeats, settings.seed, listener, should_stop)
    return NetworkResult(model, measured, rounds, complete, notes)


def measure(
    cases: Sequence[Case], repeats: int, seed: int, listener: Listener, should_stop: Callable[[], bool]
) -> tuple[list[Measured], list[Round], bool]:
    """Compile all cases, then time those to be timed.

    Args:
        cases: With unique names.
        repeats: Rounds.
        seed: Of the order within the rounds.
        listener: Informed of the progress.
        should_stop: Called between compilations and calls.

    Returns:
        The cases that were compiled; the rounds, times for one step where a call makes several; whether
        nothing was cut short.
    """
    measured: list[Measured] = []
    prepared: dict[str, Prepared] = {}
    for number, case in enumerate(cases):
        if should_stop():
            return measured, [], False
        listener.preparing(number, len(cases), case.name)
        ready = case.prepare()
        if case.timed:
            prepared[case.name] = ready
        if ready.program is None:
            measured.append(Measured(case))
        else:
            program = ready.program
            measured.append(Measured(case, program.lower_seconds, program.compile_seconds, program.memory))
    if not prepared:
        return measured, [], True
    rounds = take_rounds(
        {name: ready.call for name, ready in prepared.items()},
        repeats,
        seed,
        should_stop=should_stop,
        on_turn=lambda number, name: listener.turn(number, repeats, name),
    )
    steps = {case.name: case.steps * case.seeds for case in cases}
    rounds = [{name: value / steps[name] for name, value in seconds.items()} for seconds in rounds]
    complete = len(rounds) == repeats and all(len(seconds) == len(prepared) for seconds in rounds)
    return measured, rounds, complete
