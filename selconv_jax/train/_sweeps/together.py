"""Runs of a sweep that differ only in their seed, trained in one program.

Each is an ordinary run, which waits for the others only where it requests steps or an evaluation, computed by
one program for all. A run may thus be started alone and resumed together, or vice versa; one that is behind
catches up first.
"""

import contextlib
import traceback
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from selconv_jax._utils.console import print_line
from selconv_jax.data._dataset import ImageData
from selconv_jax.data._stream import StreamedData
from selconv_jax.errors import SelconvError
from selconv_jax.train import _run_setup as run_setup
from selconv_jax.train._config import Config
from selconv_jax.train._loop import RunContext
from selconv_jax.train._progress import Display, SharedDisplay
from selconv_jax.train._seeds.requests import Request, Requests, answered
from selconv_jax.train._seeds.trainer import JointTrainer, MemberTrainer, common_program
from selconv_jax.train._signals import StopRequest, stop_request
from selconv_jax.train._sweeps.configurations import SweepRun
from selconv_jax.train._sweeps.one_run import one_line, run_of_sweep
from selconv_jax.train._trainer import Trainer


def make_together(runs: Sequence[SweepRun], console: Console) -> list[tuple[int, str]]:
    """Train or resume, in one program, runs that differ only in their seed; returns `make_run` of each.

    A run that fails does not affect the others; the failure is noted in its `SweepRun.log`.
    """
    try:
        trainer, data = run_setup.prepare(runs[0].config)
    except Exception as error:  # such as out of memory: another configuration may fit
        known = isinstance(error, SelconvError)
        text = one_line(error) if known else f"{type(error).__name__}: {one_line(error)}"
        print_line(console, f"failed: {text}")
        for run in runs:
            run.write_log(f"failed: {text}\n" if known else traceback.format_exc())
        return [(1, text)] * len(runs)
    return _Together(runs, trainer, data, console).make()


class _Together:
    """Runs in progress."""

    def __init__(
        self, runs: Sequence[SweepRun], trainer: Trainer, data: ImageData | StreamedData, console: Console
    ) -> None:
        self.runs, self.data, self.trainer = runs, data, trainer
        self.display = SharedDisplay(console)
        # The request to stop as the runs see it. It changes only while all of them wait, so that they stop at
        # the same step.
        self.heard = StopRequest()
        self._joint: dict[int, JointTrainer] = {}

    def make(self) -> list[tuple[int, str]]:
        members = [self._run(member) for member in range(len(self.runs))]
        with stop_request() as stop:
            return answered(members, lambda requests: self._answer(requests, stop))

    def _run(self, member: int) -> Requests[tuple[int, str]]:
        run, context = self.runs[member], _MemberContext(self, member)
        code, error = yield from run_of_sweep(run, context)
        if error:
            context.say(f"failed: {error}")
            run.write_log(f"failed: {error}\n")
        return code, error

    def _answer(self, requests: Sequence[Request], stop: StopRequest) -> Sequence[Any]:
        def should_stop() -> bool:
            stopping = stop.check()
            self.heard.signal = stop.signal
            return stopping

        should_stop()
        count, program = len(requests), common_program(requests)
        joint = None if count == 1 else self._joint.get(count) or JointTrainer(self.trainer, count)
        for other in self._joint.values():
            if other is not joint:
                other.forget()
        if requests[0].batches is not None and not (joint or self.trainer).is_compiled(program):
            of = "one seed" if joint is None else f"{count} seeds"
            self.display.line(f"compiling the training step of {of}{program.note}")
        if joint is None:
            return [requests[0].answer(should_stop)]
        self._joint[count] = joint
        return joint.answer(requests, should_stop)


class _MemberContext(RunContext):
    """Environment of one of the runs trained together."""

    def __init__(self, together: _Together, member: int) -> None:
        super().__init__(together.display.console)
        self._together, self._member = together, member
        self._name = f"seed {together.runs[member].config.seed}"

    def prepare(self, config: Config) -> tuple[Trainer, ImageData | StreamedData]:
        trainer = MemberTrainer(self._together.trainer, config)
        if self._member:
            trainer.notes = ()  # the first run has reported them
        return trainer, self._together.data

    def display(self, trainer: Trainer, step: int) -> Display:
        return self._together.display.of(self._name, trainer.steps, step, trainer.steps_per_epoch)

    def stop_request(self) -> contextlib.AbstractContextManager[StopRequest]:
        return contextlib.nullcontext(self._together.heard)

    def say(self, text: str) -> None:
        self._together.display.line(f"{self._name}: {text}")
