"""Progress display of a run: a bar on a terminal, plain lines otherwise."""

import time
from collections.abc import Callable
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

__all__ = ["Display", "ProgressDisplay"]

_SECONDS_BETWEEN_LINES = 20.0


class Display(Protocol):
    """Display of a run's progress, see `ProgressDisplay`."""

    def update(self, step: int, loss: float, accuracy: float, images_per_second: float) -> None:
        """Show new values."""

    def line(self, text: str) -> None:
        """Print a permanent line."""

    def close(self) -> None:
        """Remove the bar."""


class ProgressDisplay:
    """Display of the steps of a run: a bar on a terminal, else a line every 20 seconds.

    Args:
        total: Steps of the whole run.
        done: Steps done before this process.
        steps_per_epoch: Steps per epoch.
        console: Where to write.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        total: int,
        done: int,
        steps_per_epoch: int,
        console: Console,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._per_epoch = total, steps_per_epoch
        self._console, self._clock = console, clock
        self._last_line = clock()
        # Steps and time from which the speed is measured, so that compilation does not count.
        self._since: tuple[int, float] | None = None
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("epoch {task.fields[epoch]}"),
                BarColumn(bar_width=None),
                # On a narrow terminal the bar gets shorter, and no number is cut off.
                MofNCompleteColumn(table_column=Column(no_wrap=True)),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task("", total=total, completed=done, epoch="", numbers="compiling")
            self._bar.start()

    def update(self, step: int, loss: float, accuracy: float, images_per_second: float) -> None:
        """Show new values.

        Args:
            step: Training steps done, of the whole run.
            loss: Mean training loss of the epoch so far.
            accuracy: Training accuracy of the epoch so far, a fraction.
            images_per_second: Training speed.
        """
        now = self._clock()
        self._since = self._since or (step, now)
        epoch = f"{min(step // self._per_epoch + 1, self._epochs)}/{self._epochs}"
        if self._bar is not None:
            # Short enough for a terminal of 80 characters.
            numbers = f"loss {loss:.4f}  acc. {accuracy:.2%}  {images_per_second:,.0f}/s"
            self._bar.update(self._task, completed=step, epoch=epoch, numbers=numbers)
            return
        if now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            numbers = f"loss {loss:.4f}  accuracy {accuracy:.2%}  {images_per_second:,.0f} images/s"
            self.line(f"epoch {epoch}  step {step}/{self._total}  {numbers}{self._left(step, now)}")

    def line(self, text: str) -> None:
        """Print a permanent line."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()

    @property
    def _epochs(self) -> int:
        return self._total // self._per_epoch

    def _left(self, step: int, now: float) -> str:
        first, started = self._since or (step, now)
        if step <= first or now <= started:
            return ""
        return f"  {format_duration((now - started) / (step - first) * (self._total - step))} left"


def format_duration(seconds: float) -> str:
    """Format seconds as ``"1:02:03"`` or ``"2:03"``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
