"""A benchmark of one network: everything compiled and warm first, then timed in turns."""

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
    """Who is told how a benchmark goes on."""

    def preparing(self, number: int, count: int, name: str) -> None:
        """A case, counted from 0, is about to be compiled."""

    def turn(self, number: int, count: int, name: str) -> None:
        """A case is about to be timed, in a round counted from 0."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """A case and what is known of it.

    Attributes:
        case: The case.
        lower_seconds: See `compilation.Program`; None: not known.
        compile_seconds: See `compilation.Program`.
        memory: See `compilation.memory_of`.
    """

    case: Case
    lower_seconds: float | None = None
    compile_seconds: float | None = None
    memory: dict[str, int] | None = None


@dataclasses.dataclass(frozen=True)
class NetworkResult:
    """What came of the benchmark of a network.

    Attributes:
        model: Its name.
        cases: Those that were compiled.
        rounds: Seconds of those that are timed, for one step where a call makes several.
        complete: Whether nothing was cut short.
        notes: What the reader should know, such as what was left out.
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
        listener: Is told how it goes on.
        should_stop: Asked between compilations and calls; what has been measured by then is the result.

    Returns:
        The measurements.
    """
    bench = Workbench(model, settings)
    cases, notes = plan_cases(bench), []
    if settings.torch:
        baseline = load_torch_baseline()
        # After our steps, before what is not a step.
        at = sum(case.group == cases[0].group for case in cases)
        cases[at:at] = baseline.plan_torch_cases(bench)
        notes.append(baseline.TORCH_NOTE)
    measured, rounds, complete = measure(cases, settings.repeats, settings.seed, listener, should_stop)
    return NetworkResult(model, measured, rounds, complete, notes)


def measure(
    cases: Sequence[Case], repeats: int, seed: int, listener: Listener, should_stop: Callable[[], bool]
) -> tuple[list[Measured], list[Round], bool]:
    """Compiles all cases, then times those that are to be timed.

    Args:
        cases: With names of their own.
        repeats: Rounds.
        seed: Of the order within the rounds.
        listener: Is told how it goes on.
        should_stop: Asked between compilations and calls.

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
