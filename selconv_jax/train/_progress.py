"""Progress display of a run, or of several trained together: a bar on a terminal, plain lines otherwise."""

import time
from collections.abc import Callable
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from selconv_jax._utils.console import print_line

_SECONDS_BETWEEN_LINES = 20.0


class Display(Protocol):
    """Display of a run's progress."""

    def update(self, step: int, loss: float, accuracy: float, images_per_second: float) -> None:
        """Show the steps done of the whole run, and the means of the epoch so far."""

    def line(self, text: str) -> None:
        """Print a permanent line."""

    def close(self) -> None:
        """Remove the bar."""


class ProgressDisplay:
    """Display of the ``total`` steps of a run: a bar on a terminal, else a line every 20 seconds."""

    def __init__(
        self,
        total: int,
        done: int,
        steps_per_epoch: int,
        console: Console,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._per_epoch = total, steps_per_epoch
        self._epochs = total // steps_per_epoch
        self._console, self._clock = console, clock
        self._last_line = clock()
        # Steps and time from which the time left is estimated, so that compilation does not count.
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
        now = self._clock()
        self._since = self._since or (step, now)
        epoch = f"{min(step // self._per_epoch + 1, self._epochs)}/{self._epochs}"
        if self._bar is not None:
            # Short enough for a terminal of 80 characters.
            numbers = f"loss {loss:.4f}  acc. {accuracy:.2%}  {images_per_second:,.0f}/s"
            self._bar.update(self._task, completed=step, epoch=epoch, numbers=numbers)
        elif now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            first, started = self._since
            left = ""
            if step > first and now > started:
                left = f"  {format_duration((now - started) / (step - first) * (self._total - step))} left"
            numbers = f"loss {loss:.4f}  accuracy {accuracy:.2%}  {images_per_second:,.0f} images/s"
            self.line(f"epoch {epoch}  step {step}/{self._total}  {numbers}{left}")

    def line(self, text: str) -> None:
        print_line(self._console, text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


class SharedDisplay:
    """Display of the means over several runs and their total speed; lines begin with the name of a run."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._display: ProgressDisplay | None = None
        self._numbers: dict[str, tuple[int, float, float, float]] = {}
        self._open: set[str] = set()

    def of(self, name: str, total: int, done: int, steps_per_epoch: int) -> Display:
        """Return the display of one run, as a `ProgressDisplay`."""
        self._open.add(name)
        if self._display is None:
            self._display = ProgressDisplay(total, done, steps_per_epoch, self.console)
        return _Part(self, name)

    def line(self, text: str) -> None:
        print_line(self.console, text)

    def update(self, name: str, step: int, loss: float, accuracy: float, images_per_second: float) -> None:
        self._numbers[name] = step, loss, accuracy, images_per_second
        steps, losses, accuracies, speeds = zip(*self._numbers.values(), strict=True)
        count = len(steps)
        if self._display is not None and name == min(self._numbers):
            mean_loss, mean_accuracy = sum(losses) / count, sum(accuracies) / count
            self._display.update(min(steps), mean_loss, mean_accuracy, sum(speeds))

    def close(self, name: str) -> None:
        self._open.discard(name)
        self._numbers.pop(name, None)
        if not self._open and self._display is not None:
            self._display.close()
            self._display = None


class _Part:
    """The display of one run."""

    def __init__(self, shared: SharedDisplay, name: str) -> None:
        self._shared, self._name = shared, name

    def update(self, step: int, loss: float, accuracy: float, images_per_second: float) -> None:
        self._shared.update(self._name, step, loss, accuracy, images_per_second)

    def line(self, text: str) -> None:
        self._shared.line(f"{self._name}: {text}")

    def close(self) -> None:
        self._shared.close(self._name)


def format_duration(seconds: float) -> str:
    """Format seconds as ``"1:02:03"`` or ``"2:03"``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
