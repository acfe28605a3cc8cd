"""Consoles of the commands: for results, whose loss is an error, and for progress, whose loss is ignored."""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO, cast

from rich.console import Console, Group
from rich.measure import Measurement
from rich.table import Table

_LINE = 200  # characters, where no terminal reports its width
_WIDEST = 1000

Progress = Callable[[str, int, int], None]
"""Called as ``progress(task, done, total)``, with ``done == total`` at the end of each task."""


class ForgivingStream(io.TextIOBase):
    """A text stream that accepts everything and never raises.

    Characters that the encoding lacks are replaced. Text that cannot be written (broken pipe, full disk,
    closed stream) is dropped.

    Args:
        stream: Where to write; None: nowhere.

    Example:
        >>> latin = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
        >>> stream = ForgivingStream(latin)
        >>> print("cut\u2026", end="", file=stream, flush=True)
        >>> latin.buffer.getvalue()
        b'cut?'
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Encoding of the stream."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        """Return whether the stream is a terminal."""
        with contextlib.suppress(OSError, ValueError):
            return self._stream is not None and self._stream.isatty()
        return False

    def fileno(self) -> int:
        """Return the stream's file descriptor."""
        if self._stream is None:
            raise io.UnsupportedOperation("fileno")
        return self._stream.fileno()

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, text: str, /) -> int:
        """Write what can be written."""
        if self._stream is not None:
            shown = text.encode(self.encoding, "replace").decode(self.encoding, "replace")
            self._attempt(self._stream.write, shown)
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        if self._stream is not None:
            self._attempt(self._stream.flush)

    def _attempt(self, action: Callable[..., object], *arguments: str) -> None:
        try:
            action(*arguments)
        except OSError as error:
            if error.errno == errno.EPIPE:
                discard(self._stream)
        except ValueError:  # it is closed
            pass


def discard(stream: TextIO | None) -> None:
    """Redirect a stream to the null device, including text that it still buffers."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # type: ignore[union-attr]
        os.close(nowhere)


class _Console(Console):
    """A console that prints text verbatim: no markup in brackets, no ``:name:`` emoji."""

    def __init__(self, stream: TextIO) -> None:
        width = None if stream.isatty() else _LINE
        super().__init__(file=stream, width=width, markup=False, emoji=False, highlight=False)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as every console, but exceed the terminal's width rather than truncate numbers."""
        before = self._width
        wide = self.options.update(width=_WIDEST)
        tables = [each for each in objects if isinstance(each, Table | Group)]
        needed = max((Measurement.get(self, wide, each).minimum for each in tables), default=0)
        if needed > self.width:
            self._width = needed
        try:
            super().print(*objects, **options)
        finally:
            self._width = before

    def on_broken_pipe(self) -> None:
        """Re-raise the broken pipe, during whose handling this is called."""
        raise


def terminal_or_lines(stream: TextIO | None = None) -> Console:
    """Create a console for results, which wraps nothing unless it is a terminal; its errors are raised."""
    return _Console(stream or sys.stdout)


def progress_console(stream: TextIO | None = None) -> Console:
    """Create a console for progress, which never raises, see `ForgivingStream`."""
    return _Console(cast(TextIO, ForgivingStream(stream or sys.stdout)))


@contextlib.contextmanager
def console_progress() -> Iterator[Progress]:
    """Report progress on standard error: a bar per task on a terminal, else a line at the end of each task.

    Example:
        >>> with console_progress() as progress:
        ...     progress("Counting", 3, 3)
    """
    import rich.progress  # here, so that commands that show no bar do not wait for it

    console = progress_console(sys.stderr)
    if not console.is_terminal:

        def line(task: str, done: int, total: int) -> None:
            if done == total:
                text = f"{task}: {total:,}" if total > 1 else task
                console.print(text, markup=False, highlight=False, soft_wrap=True)

        yield line
        return

    with rich.progress.Progress(
        rich.progress.TextColumn("{task.description}", markup=False),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        console=console,
    ) as bars:
        tasks: dict[str, rich.progress.TaskID] = {}

        def bar(task: str, done: int, total: int) -> None:
            if task not in tasks:
                tasks[task] = bars.add_task(task, total=total)
            bars.update(tasks[task], completed=done)

        yield bar


def print_line(console: Console, text: str) -> None:
    """Print a text verbatim, unwrapped, on any console."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)
