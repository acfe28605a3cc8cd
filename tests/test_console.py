"""Consoles take text as it is; what only shows progress never stops the work."""

import errno
import io
import os

import pytest
from rich.console import Console
from rich.table import Table

from selconv_jax._utils.console import ForgivingStream, progress_console, terminal_or_lines
from selconv_jax.train._progress import ProgressDisplay

NAME = "runs/[bold]lr=[0.1][/bold]/[/]/:smile:/\\[x"


class Failing(io.StringIO):
    """Cannot be written, as a full disk."""

    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    def flush(self):
        self.write("")


def closed():
    """A file that has been closed."""
    file = io.StringIO()
    file.close()
    return file


def gone():
    """A pipe whose reader has left."""
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w", encoding="utf-8")


def show_a_run(console):
    """All that a run shows."""
    display = ProgressDisplay(100, 0, 10, console, clock=iter(range(0, 10_000, 100)).__next__)
    for step in (1, 50, 100):
        display.update(step, 1.0, 0.5, 100.0)
    display.line(f"run in {NAME}")
    display.close()


@pytest.mark.parametrize("console", [terminal_or_lines, progress_console])
def test_names_are_no_markup(console):
    text = io.StringIO()
    console(text).print(f"run in {NAME}")
    table = Table(NAME)
    table.add_row(NAME)
    console(text).print(table)
    assert text.getvalue().count(NAME) == 3


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437", "utf-8"])
def test_what_the_encoding_lacks_is_replaced(encoding):
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = progress_console(file)
    console.print("accuracy \u2026 \U0001f600 \udcff end")
    show_a_run(console)
    written = file.buffer.getvalue().decode(encoding)
    assert written.startswith("accuracy ")
    assert written.splitlines()[0].endswith("end")
    assert NAME in written


def test_a_bar_on_a_narrow_terminal_of_another_encoding():
    """What does not fit ends in a letter that latin-1 lacks."""
    file = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    console = Console(file=ForgivingStream(file), force_terminal=True, width=30)
    show_a_run(console)
    console.print(NAME, no_wrap=True, overflow="ellipsis", width=10, markup=False)
    assert b"?" in file.buffer.getvalue()


@pytest.mark.parametrize("stream", [Failing, closed, gone])
def test_nothing_that_shows_progress_is_raised(stream):
    file = stream()
    show_a_run(Console(file=ForgivingStream(file), force_terminal=True, width=80))
    if stream is not closed:
        show_a_run(progress_console(file))
    if stream is gone:
        assert file.close() is None  # would raise, had it still something to write to the pipe


@pytest.mark.parametrize("stream", [Failing, gone])
def test_the_loss_of_results_is_raised(stream):
    file = stream()
    with pytest.raises(OSError, match=r"No space left|Broken pipe"):
        terminal_or_lines(file).print("test accuracy 50%")
    ForgivingStream(file).flush()


def test_no_stream():
    stream = ForgivingStream(None)
    assert stream.write("text") == 4
    assert not stream.isatty()
    with pytest.raises(io.UnsupportedOperation):
        stream.fileno()


def test_a_table_is_never_cut():
    text = io.StringIO()
    console = terminal_or_lines(text)
    console._width = 20
    table = Table(*(f"column {number}" for number in range(6)))
    for column in table.columns:
        column.no_wrap = True
    table.add_row(*(f"{number}23,456,789" for number in range(6)))
    console.print(table)
    assert all(f"{number}23,456,789" in text.getvalue() for number in range(6))


@pytest.mark.parametrize(("seconds", "left"), [((0, 60, 60, 160), "1:30:00 left"), ((0, 60), "images/s\n")])
def test_the_time_left_does_not_count_what_was_compiled(seconds, left):
    """One step in the first minute, then fifty in a hundred seconds."""
    text = io.StringIO()
    clock = iter(seconds)
    display = ProgressDisplay(2751, 0, 10, terminal_or_lines(text), clock=lambda: next(clock))
    display.update(1, 1.0, 0.5, 100.0)
    assert "left" not in text.getvalue()
    if len(seconds) > 2:
        display.update(1, 1.0, 0.5, 100.0)
        display.update(51, 1.0, 0.5, 100.0)
    assert text.getvalue().endswith(f"{left}\n" if "left" in left else left)


def test_the_bar_fits_eighty_characters():
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=80)
    display = ProgressDisplay(117_300, 0, 391, console, clock=iter(range(100)).__next__)
    display.update(117_299, 0.1234, 0.98765, 12_345.6)
    display.close()
    for part in ("epoch 300/300", "117299/117300", "loss 0.1234  acc. 98.77%  12,346/s"):
        assert part in text.getvalue()
