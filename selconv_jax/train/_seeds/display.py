"""Progress of several runs trained together, as one bar or line."""

import threading

from rich.console import Console

from selconv_jax.train._progress import Display, ProgressDisplay
from selconv_jax.train._trainer import Trainer

__all__ = ["SharedDisplay"]


class SharedDisplay:
    """Display of the means over the runs and their total speed; lines begin with the name of their run.

    Args:
        console: Where to write.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._lock = threading.RLock()
        self._display: ProgressDisplay | None = None
        self._numbers: dict[str, tuple[int, float, float, float]] = {}
        self._open: set[str] = set()

    def of(self, name: str, trainer: Trainer, step: int) -> Display:
        """Return the display of one run.

        Args:
            name: Of the run.
            trainer: Its trainer.
            step: The step that it starts from.
        """
        with self._lock:
            self._open.add(name)
            if self._display is None:
                self._display = ProgressDisplay(trainer.steps, step, trainer.steps_per_epoch, self.console)
        return _Part(self, name)

    def line(self, text: str) -> None:
        """Print a permanent line."""
        with self._lock:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def update(self, name: str, *numbers: float) -> None:
        """Show new values of a run, as `ProgressDisplay.update`."""
        step, loss, accuracy, speed = numbers
        with self._lock:
            self._numbers[name] = int(step), loss, accuracy, speed
            steps, losses, accuracies, speeds = zip(*self._numbers.values(), strict=True)
            count = len(steps)
            if self._display is not None and name == min(self._numbers):
                mean_loss, mean_accuracy = sum(losses) / count, sum(accuracies) / count
                self._display.update(min(steps), mean_loss, mean_accuracy, sum(speeds))

    def close(self, name: str) -> None:
        """Remove a run from the display."""
        with self._lock:
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
