"""Computations that a run asks for, so that those of several runs can be made by one program.

A run is a generator that yields requests and is sent their answers; everything else it does itself.
"""

import dataclasses
import functools
from collections.abc import Callable, Generator, Iterator
from typing import Any, TypeAlias, TypeVar

from selconv_jax.train._feed import Arguments
from selconv_jax.train._network import Program
from selconv_jax.train._state import TrainState
from selconv_jax.train._trainer import Trainer

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Request:
    """A computation of a run: ``count`` training steps, or without batches an evaluation of a split.

    Its ``order`` is the run's step, and the kind of computation: of several runs, the requests of the lowest
    order are answered first, all of one order together. Its ``program`` is the smallest that fits its state.
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


def answered(run: Requests[T]) -> T:
    """Answer the requests of a run that is alone, until it ends; return what it returns."""
    advance: Callable[[], Request] = functools.partial(next, run)
    try:
        while True:
            request = advance()
            try:
                advance = functools.partial(run.send, request.answer())
            except BaseException as error:
                advance = functools.partial(run.throw, error)
    except StopIteration as end:
        return end.value
