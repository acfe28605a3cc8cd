"""Where the commands write."""

import sys
from typing import TextIO

from rich.console import Console

__all__ = ["terminal_or_lines"]


def terminal_or_lines(stream: TextIO | None = None) -> Console:
    """A console on ``stream`` (default: standard output) that wraps nothing when it is no terminal."""
    stream = stream or sys.stdout
    return Console(file=stream, width=None if stream.isatty() else 200)
