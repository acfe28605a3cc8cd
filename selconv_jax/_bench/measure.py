"""Timing several cases in turns, so that they can be compared on a machine that is never quite idle."""

import dataclasses
import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

__all__ = ["Round", "Summary", "paired_ratio", "seconds_of", "summarize", "take_rounds"]

# Seconds by case, in the order in which the cases took their turns.
Round = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Summary:
    """Statistics of the repetitions of one case, in seconds.

    Attributes:
        count: Number of repetitions.
        median: Their median.
        low: Their first quartile.
        high: Their third quartile.
        minimum: The fastest.
    """

    count: int
    median: float
    low: float
    high: float
    minimum: float


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

    Each is called twice in a row, and the second call is timed: in a training run, too, a step follows on a
    step of the same program, and finds memory and caches as that has left them.

    What slows the machine down for a while so slows all cases, not one of them; and within a round they
    can be compared in pairs. Python's garbage collector works between the rounds only.

    Args:
        calls: Functions by name; each blocks until its work is done, and has been called before.
        repeats: Number of rounds.
        seed: Seed of the orders.
        clock: Seconds, monotonic.
        should_stop: Called before every case.
        on_turn: Called with the index of the round and the name of the case before every case.

    Returns:
        The rounds; after a stop as many as there were, the last one perhaps not whole.

    Example:
        >>> rounds = take_rounds({"a": lambda: None, "b": lambda: None}, repeats=3, seed=0)
        >>> [sorted(seconds) for seconds in rounds]
        [['a', 'b'], ['a', 'b'], ['a', 'b']]
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


def seconds_of(rounds: Sequence[Round], name: str) -> list[float]:
    """Collect all repetitions of a case, in the order of the rounds."""
    return [seconds[name] for seconds in rounds if name in seconds]


def summarize(seconds: Sequence[float]) -> Summary:
    """Compute median, quartiles and minimum.

    Args:
        seconds: At least one number.

    Returns:
        The statistics; quartiles are interpolated between the repetitions (the extremes included).

    Example:
        >>> summarize([4.0, 1.0, 2.0, 3.0, 10.0])
        Summary(count=5, median=3.0, low=2.0, high=4.0, minimum=1.0)
    """
    low, middle, high = (
        statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 3
    )
    return Summary(count=len(seconds), median=middle, low=low, high=high, minimum=min(seconds))


def paired_ratio(rounds: Sequence[Round], name: str, base: str) -> float | None:
    """Compute the median over the rounds of the ratio of two cases' times within the same round.

    Args:
        rounds: From `take_rounds`.
        name: The case.
        base: The one that it is compared with.

    Returns:
        The ratio; None if no round has both.

    Example:
        >>> paired_ratio([{"a": 1.0, "b": 2.0}, {"a": 10.0, "b": 30.0}, {"a": 2.0}], "b", "a")
        2.5
    """
    ratios = [seconds[name] / seconds[base] for seconds in rounds if name in seconds and base in seconds]
    return statistics.median(ratios) if ratios else None
