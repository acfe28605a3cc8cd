"""Benchmark of one network: all cases are compiled and warmed up first, then timed in turns."""

import dataclasses
import gc
import random
import time
from collections.abc import Callable, Mapping, Sequence

from selconv_jax._bench.cases import Case, plan_cases
from selconv_jax._bench.progress import BenchProgress
from selconv_jax._bench.settings import BenchSettings, load_torch_baseline
from selconv_jax._bench.workbench import Prepared, Workbench

# Seconds by case, in the order in which the cases took their turns.
Round = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Measured:
    """A compiled case, the seconds of its ``tracing`` and ``compiling``, and its memory (`TimedProgram`)."""

    case: Case
    compile: dict[str, float] | None = None
    memory: dict[str, int] | None = None


@dataclasses.dataclass(frozen=True)
class NetworkResult:
    """Results of the benchmark of a network."""

    model: str
    cases: Sequence[Measured]  # those that were compiled
    rounds: Sequence[Round]  # seconds of the timed cases, per step if a call makes several
    complete: bool  # false if the benchmark was stopped early
    notes: Sequence[str] = ()  # remarks for the reader, such as omitted cases


def bench_network(
    model: str, settings: BenchSettings, progress: BenchProgress, should_stop: Callable[[], bool]
) -> NetworkResult:
    """Make all measurements of a network; those so far if ``should_stop`` between compilations and calls."""
    bench = Workbench(model, settings)
    cases, notes = plan_cases(bench), []
    if settings.torch:
        baseline = load_torch_baseline()
        # After our training steps, before the cases that are not steps.
        at = sum(case.group == cases[0].group for case in cases)
        cases[at:at] = baseline.plan_torch_cases(bench)
        notes.append(baseline.TORCH_NOTE)
    measured, rounds, complete = measure(cases, settings.repeats, settings.seed, progress, should_stop)
    return NetworkResult(model, measured, rounds, complete, notes)


def measure(
    cases: Sequence[Case], repeats: int, seed: int, progress: BenchProgress, should_stop: Callable[[], bool]
) -> tuple[list[Measured], list[Round], bool]:
    """Compile all cases, then time those to be timed.

    Returns:
        The cases that were compiled; the rounds, times for one step where a call makes several; whether
        nothing was cut short.
    """
    measured: list[Measured] = []
    prepared: dict[str, Prepared] = {}
    for number, case in enumerate(cases):
        if should_stop():
            return measured, [], False
        progress.preparing(number, len(cases), case.name)
        ready = case.prepare()
        if case.timed:
            prepared[case.name] = ready
        if (program := ready.program) is None:
            measured.append(Measured(case))
        else:
            seconds = {"tracing": program.lower_seconds, "compiling": program.compile_seconds}
            measured.append(Measured(case, seconds, program.memory))
    if not prepared:
        return measured, [], True
    rounds = take_rounds(
        {name: ready.call for name, ready in prepared.items()},
        repeats,
        seed,
        should_stop=should_stop,
        on_turn=lambda number, name: progress.turn(number, repeats, name),
    )
    steps = {case.name: case.steps * case.seeds for case in cases}
    rounds = [{name: value / steps[name] for name, value in seconds.items()} for seconds in rounds]
    complete = len(rounds) == repeats and all(len(seconds) == len(prepared) for seconds in rounds)
    return measured, rounds, complete


def take_rounds(
    calls: Mapping[str, Callable[[], object]],
    repeats: int,
    seed: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
    should_stop: Callable[[], bool] = lambda: False,
    on_turn: Callable[[int, str], None] = lambda number, name: None,
) -> list[Round]:
    """Time every case once per round, in a new random order in each round.

    What slows the machine down for a while thus slows all cases, not one of them, and within a round they
    can be compared in pairs. The calls, by name, block until their work is done, and have been made before.
    Each is made twice in a row, and the second is timed: in a training run, too, a step follows on a step of
    the same program, and finds memory and caches as that has left them.

    If ``should_stop`` before a case, the last round may not be whole.
    """
    rng = random.Random(seed)
    rounds: list[Round] = []
    was_enabled = gc.isenabled()
    # Existing objects are not scanned by the garbage collector between the rounds.
    gc.freeze()
    try:
        for number in range(repeats):
            order = list(calls)
            rng.shuffle(order)
            gc.collect()
            gc.disable()
            seconds: dict[str, float] = {}
            for name in order:
                if should_stop():
                    return [*rounds, seconds] if seconds else rounds
                on_turn(number, name)
                calls[name]()
                start = clock()
                calls[name]()
                seconds[name] = clock() - start
            rounds.append(seconds)
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
    return rounds
