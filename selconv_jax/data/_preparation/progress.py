"""Progress reports of long tasks: a bar on a terminal, plain lines elsewhere."""

import contextlib
import sys
from collections.abc import Callable, Iterator

import rich.progress

from selconv_jax._utils.console import progress_console

__all__ = ["Progress", "console_progress"]

Progress = Callable[[str, int, int], None]
"""Called as ``progress(task, done, total)``, with ``done == total`` at the end of each task."""


@contextlib.contextmanager
def console_progress() -> Iterator[Progress]:
    """Report progress on standard error.

    Yields:
        The reporter. On a terminal it draws one bar per task; elsewhere it writes a line at the end of
        each task.

    Example:
        >>> with console_progress() as progress:
        ...     progress("Counting", 3, 3)
    """
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
