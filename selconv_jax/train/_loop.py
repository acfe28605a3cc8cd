"""The training loop: epochs, evaluation, re-allocation, checkpoints, records."""

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from shlex import quote
from typing import Any

import jax
from rich.console import Console

from selconv_jax._utils.console import print_line, progress_console
from selconv_jax.data._dataset import DatasetInfo, ImageData
from selconv_jax.data._stream import StreamedData
from selconv_jax.errors import CheckpointError, SelconvError
from selconv_jax.train import _run_setup as run_setup
from selconv_jax.train._checkpoints.checkpoint import CheckpointStore
from selconv_jax.train._config import Config
from selconv_jax.train._distributed.agreement import (
    check_same_state,
    first_decides,
    is_first,
    on_first,
    together,
)
from selconv_jax.train._evaluation import evaluation_metrics
from selconv_jax.train._metrics import MetricsLog, channel_counts, read_metrics, sentence
from selconv_jax.train._network import Program
from selconv_jax.train._progress import Display, ProgressDisplay
from selconv_jax.train._round_log import RoundLog
from selconv_jax.train._seeds.requests import Request, Requests, answered_alone
from selconv_jax.train._signals import StopRequest, stop_request
from selconv_jax.train._speed import Speedometer
from selconv_jax.train._state import TrainState
from selconv_jax.train._trackers import check_tracker, open_tracker
from selconv_jax.train._trainer import Trainer
from selconv_jax.train._workdir import METRICS, ROUNDS, check_free, create_workdir

_REFRESH_SECONDS = 0.5
_DISPATCHES_BETWEEN_LOOKS = 20  # at the clock, which takes a broadcast to all processes


class NonFiniteLossError(SelconvError):
    """The training loss became infinite or not a number."""


class RunContext:
    """Environment of a run: functions, images, progress display, requests to stop; here of a single run."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def prepare(self, config: Config) -> tuple[Trainer, ImageData | StreamedData]:
        """Return its compiled functions and its images, see `_run_setup.prepare`."""
        return run_setup.prepare(config)

    def display(self, trainer: Trainer, step: int) -> Display:
        """Return the display of its progress from a step on."""
        return ProgressDisplay(trainer.steps, step, trainer.steps_per_epoch, self.console)

    def stop_request(self) -> AbstractContextManager[StopRequest]:
        """Return the request to stop that it checks while it is entered."""
        return stop_request()

    def say(self, text: str) -> None:
        """Print a permanent line."""
        print_line(self.console, text)


def train_run(config: Config, workdir: Path, console: Console | None = None) -> int:
    """Train from scratch in a new directory.

    Args:
        config: The run.
        workdir: A directory that does not exist or is empty.
        console: `rich.console.Console` of the progress; None: standard output.

    Returns:
        0 when the run is complete, 128 plus the signal number when a signal stopped it.

    Raises:
        SelconvError: A user-fixable error; nothing was overwritten.

    Example:
        >>> import rich.console
        >>> from pathlib import Path
        >>> from selconv_jax.train import Config, DataConfig, ModelConfig, evaluate_run, train_run
        >>> config = Config(
        ...     epochs=1, batch_size=1000, data=DataConfig(name="fashion_mnist_sample"),
        ...     model=ModelConfig(name="densenet40", options={"blocks": [1], "growth": 2}))
        >>> train_run(config, Path("first"), rich.console.Console(quiet=True))
        0
        >>> step, metrics = evaluate_run(Path("first"))
        >>> step, sorted(metrics)
        (2, ['test_accuracy', 'test_loss', 'test_top5'])
    """
    return answered_alone(new_run(config, workdir, RunContext(console or progress_console())))


def new_run(config: Config, workdir: Path, context: RunContext) -> Requests[int]:
    """Train as `train_run` does, with the computations left to whoever answers the requests."""
    on_first(lambda: check_tracker(config.tracker))
    trainer, data = context.prepare(config)
    on_first(lambda: check_free(workdir))
    with run_setup.claimed(workdir, make=True), run_setup.open_store(config, workdir) as store:
        # Only after claiming it: another job may have been about to create its run here.
        on_first(lambda: create_workdir(workdir, config, run_setup.image_facts(data)))
        context.say(f"run in {workdir}")
        return (yield from _Run(trainer, data.info, workdir, store, context).go_on(trainer.initial_state()))


def resume_run(workdir: Path, console: Console | None = None, overrides: Sequence[str] = ()) -> int:
    """Resume a run from its newest intact checkpoint; the result equals that of an uninterrupted run.

    Args:
        workdir: The directory of the run.
        console: `rich.console.Console` of the progress; None: standard output.
        overrides: ``"key=value"`` of keys that do not change the result, for this call only.

    Returns:
        As `train_run`.

    Raises:
        SelconvError: A user-fixable error.
    """
    return answered_alone(resumed_run(workdir, RunContext(console or progress_console()), overrides))


def resumed_run(workdir: Path, context: RunContext, overrides: Sequence[str] = ()) -> Requests[int]:
    """Resume as `resume_run` does, with the computations left to whoever answers the requests."""
    config = run_setup.read_again(workdir, overrides)
    on_first(lambda: check_tracker(config.tracker))
    together(lambda: run_setup.require_surroundings(workdir, config))
    trainer, data = run_setup.prepare_again(config, context.prepare)
    run_setup.require_images(workdir, data)
    with run_setup.claimed(workdir), run_setup.open_store(config, workdir) as store:
        if first_decides(bool(store.steps())):
            restored = run_setup.restore(store, trainer)
            for note in restored.skipped:
                context.say(f"skipped: {note}")
            state = restored.state
            context.say(f"resuming from step {restored.step} of {trainer.steps}")
        else:
            state = trainer.initial_state()
            context.say("there is no checkpoint yet: starting from the beginning")
        return (yield from _Run(trainer, data.info, workdir, store, context).go_on(state))


@dataclasses.dataclass
class _Run:
    """A run in progress in this process."""

    trainer: Trainer
    info: DatasetInfo
    workdir: Path
    store: CheckpointStore
    context: RunContext

    def go_on(self, state: TrainState) -> Requests[int]:
        trainer, step = self.trainer, int(state.step)
        if step > trainer.steps:
            raise CheckpointError(
                f"the checkpoint in {self.workdir} is of step {step}, but the run has {trainer.steps} steps: "
                "it was made with other data or settings. Train anew in another --workdir."
            )
        for note in trainer.notes:
            self._note(note)
        # A checkpoint at the end of an epoch was taken before the epoch's record and re-allocation.
        ended = step > 0 and step % trainer.steps_per_epoch == 0
        epoch = step // trainer.steps_per_epoch - ended
        # The speed is known from the epoch's record only: resuming does not repeat its steps.
        metrics = self.workdir / METRICS
        records = read_metrics(metrics)
        recorded = [record for record in records if record["epoch"] == epoch + 1]
        if lost := sorted({*range(1, epoch + 1)} - {record["epoch"] for record in records}):
            self._note(f"{metrics} lacks the records of epochs {', '.join(map(str, lost))}")
        if first_decides(bool(recorded) and step == trainer.steps):
            self.context.say("complete already")
            return 0
        speed: float | None = recorded[0].get("images_per_second") if ended and recorded else None
        self._rounds = RoundLog(self.workdir / ROUNDS, self._note)
        self._log: MetricsLog | None = None
        if is_first():
            tracker = open_tracker(trainer.config, self.workdir, self._note)
            self._log = MetricsLog(metrics, self.workdir / "tensorboard", epoch, self._note, tracker)
        self._display = self.context.display(trainer, step)
        self._last_save = time.monotonic()
        self._saved_step = step
        self._dispatches = 0
        try:
            with self.context.stop_request() as self._stop:
                while epoch < trainer.config.epochs:
                    complete = False
                    if not ended:
                        state, speed = yield from self._train_epoch(state, epoch)
                    if not self._stop:
                        state, complete = yield from self._end_epoch(state, epoch, speed)
                    if self._stop and not (complete and epoch + 1 == trainer.config.epochs):
                        return self._leave(state)
                    epoch, ended = epoch + 1, False
        finally:
            self._display.close()
            if self._log is not None:
                self._log.close()
        return 0

    def _note(self, note: str) -> None:
        self.context.say(f"note: {note}")

    def _train_epoch(self, state: TrainState, epoch: int) -> Requests[tuple[TrainState, float | None]]:
        """Train to the end of the epoch or until asked to stop; also return images per second.

        Compilation, rounds and checkpoints do not count towards the speed.
        """
        trainer, speed = self.trainer, Speedometer(self.trainer.interruptions)
        program = self._program(state, epoch)
        step, end = int(state.step), (epoch + 1) * trainer.steps_per_epoch
        shown = 0.0
        waiting: jax.Array | None = None
        with contextlib.closing(trainer.batches(state, epoch)) as batches:
            while step < end and not self._stop.check():
                due = trainer.next_round(step + 1) or end
                count = min(trainer.steps_per_dispatch, min(due, end) - step)
                state, numbers = yield Request((step, 1, count), trainer, state, program, batches, count)
                step += count
                speed.add(count * trainer.config.batch_size, numbers)
                if waiting is not None:
                    # The device is never idle, and never more than one call ahead, so that a request to stop
                    # is noticed soon: these are the numbers of the previous call.
                    loss, accuracy, failed = jax.device_get(waiting)
                    if failed:
                        break
                    now, rate = time.monotonic(), speed.so_far()
                    if rate is not None and now - shown >= _REFRESH_SECONDS:
                        self._display.update(step - count, float(loss), float(accuracy), rate)
                        shown = now
                waiting = numbers
                self.store.check()
                has_round = step == due < end and bool(state.selectivity)
                is_saved = step < end and self._is_save_due()
                if has_round or is_saved:
                    jax.block_until_ready(numbers)
                    with trainer.interruptions.pauses:
                        if has_round:
                            state = self._reallocate(state)
                            program = self._program(state, epoch)
                        if is_saved:
                            self._save(state)
        self._check(state)
        return state, speed.of_all()

    def _program(self, state: TrainState, epoch: int) -> Program:
        """Choose the program of the next steps; announce it if it has to be compiled."""
        program = self.trainer.program(state, epoch)
        if not self.trainer.is_compiled(program):
            self._display.line(f"compiling the training step{program.note}")
        return program

    def _reallocate(self, state: TrainState) -> TrainState:
        state, report = self.trainer.reallocate(state)
        check_same_state(state.selectivity, f"after step {int(state.step)}")
        if is_first():
            self._rounds.write(state, report)
        return state

    def _end_epoch(
        self, state: TrainState, epoch: int, speed: float | None
    ) -> Requests[tuple[TrainState, bool]]:
        """Evaluate, save, re-allocate and record, in this order; false if asked to stop before."""
        trainer, config = self.trainer, self.trainer.config
        program = trainer.program(state, epoch)
        metrics = yield from evaluation_metrics(trainer, state, program, self.info, self._stop.check)
        if metrics is None:
            return state, False
        # Never scored by the test accuracy, which would then no longer be an unbiased estimate.
        self._save(state, score=metrics.get("validation_accuracy"))
        train, step = jax.device_get(state.totals), int(state.step)
        if state.selectivity and trainer.next_round(step) == step:
            state = self._reallocate(state)
        deallocated, reallocated = jax.device_get(state.changed).tolist()
        record: dict[str, Any] = {
            "epoch": epoch + 1,
            "train_loss": float(train.loss) / int(train.count),
            "train_accuracy": int(train.correct) / int(train.count),
            **metrics,
            "learning_rate": trainer.learning_rate(step - 1),
            "images_per_second": speed,
            "deallocated": deallocated,
            "reallocated": reallocated,
            **channel_counts(state),
        }
        if epoch + 1 == config.epochs:
            self.store.steps()  # waits for the disk: the last record marks the run as complete
        if self._log is not None:
            self._log.write(record)
        self._display.line(sentence(record, config.epochs))
        return state, True

    def _leave(self, state: TrainState) -> int:
        # The end of an epoch is saved before its re-allocation, which resuming repeats: not saved again.
        if int(state.step) != self._saved_step:
            self._save(state)
        self.store.steps()  # waits for the disk
        self._display.line(
            f"stopped after step {int(state.step)} of {self.trainer.steps}; resume with "
            f"`selconv resume {quote(str(self.workdir))}`"
        )
        return self._stop.exit_code

    def _is_save_due(self) -> bool:
        """Return whether a checkpoint is due; the clock of process 0 decides for all."""
        self._dispatches += 1
        if jax.process_count() > 1 and self._dispatches % _DISPATCHES_BETWEEN_LOOKS:
            return False
        age = time.monotonic() - self._last_save
        return first_decides(age >= 60 * self.trainer.config.checkpoint_minutes)

    def _save(self, state: TrainState, score: float | None = None) -> None:
        self._check(state)
        if not self.trainer.is_finite(state):
            self._refuse(f"the parameters after step {int(state.step)} are not finite")
        self._saved_step = int(state.step)
        self.store.save(self._saved_step, state, score)
        self._last_save = time.monotonic()

    def _check(self, state: TrainState) -> None:
        failed = int(state.failed_step)
        if failed >= 0:
            epoch = failed // self.trainer.steps_per_epoch + 1
            self._refuse(f"the loss of step {failed + 1} (epoch {epoch}) is not finite")

    def _refuse(self, problem: str) -> None:
        latest = self.store.latest_step
        kept = "there is no checkpoint yet" if latest is None else f"the checkpoint of step {latest} is kept"
        raise NonFiniteLossError(
            f"{problem}; {kept}. Train from scratch with a lower optimizer.learning_rate, or with "
            'model.dtype = "float32".'
        )
