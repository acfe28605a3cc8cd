"""Computations that a run asks for, so that those of several runs can be made by one program.

A run is a generator that yields requests and is sent their answers; everything else it does itself.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, TypeAlias, TypeVar

from selconv_jax.train._feed import Arguments
from selconv_jax.train._network import Program
from selconv_jax.train._state import TrainState
from selconv_jax.train._trainer import Trainer

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Request:
    """A computation of a run: ``count`` training steps, or without batches an evaluation of a split.

    Its ``order``, see `answered`, is the run's step, and the kind of computation. Its ``program`` is the
    smallest that fits its state.
    """

    order: tuple[int, ...]
    trainer: Trainer
    state: TrainState
    program: Program
    batches: Iterator[Arguments] | None = None
    count: int = 0
    split: str = ""
    should_stop: Callable[[], bool] = lambda: False

    def answer(self, should_stop: Callable[[], bool] | None = None) -> Any:
        """Compute it for this run alone."""
        if self.batches is None:
            return self.trainer.evaluate(
                self.state, should_stop or self.should_stop, self.program, self.split
            )
        return self.trainer.run_steps(self.state, self.batches, self.program, self.count)


Requests: TypeAlias = Generator[Request, Any, T]


def answered(runs: Sequence[Requests[T]], answer: Callable[[Sequence[Request]], Sequence[Any]]) -> list[T]:
    """Answer the requests of runs until all have ended; return what each returns.

    Requests of the lowest order come first, all of one order together, so that a run that is behind catches
    up. What ``answer`` raises is raised in the runs that asked.
    """
    waiting: dict[int, Request] = {}
    ends: dict[int, T] = {}

    def go_on(number: int, step: Callable[[], Request]) -> None:
        try:
            waiting[number] = step()
        except StopIteration as end:
            ends[number] = end.value

    with contextlib.ExitStack() as stack:
        for number, run in enumerate(runs):
            stack.enter_context(contextlib.closing(run))
            go_on(number, functools.partial(next, run))
        while waiting:
            first = min(request.order for request in waiting.values())
            chosen = sorted(number for number, request in waiting.items() if request.order == first)
            asking, requests = [runs[number] for number in chosen], [waiting.pop(number) for number in chosen]
            try:
                answers = zip(asking, answer(requests), strict=True)
                steps = [functools.partial(run.send, each) for run, each in answers]
            except BaseException as error:
                steps = [functools.partial(run.throw, error) for run in asking]
            for number, step in zip(chosen, steps, strict=True):
                go_on(number, step)
    return [ends[number] for number in range(len(runs))]


def answered_alone(run: Requests[T]) -> T:
    """Answer the requests of a single run until it ends; return what it returns."""
    return answered([run], lambda requests: [requests[0].answer()])[0]
