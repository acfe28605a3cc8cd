"""Progress of a benchmark: one changing line on a terminal, plain lines otherwise."""

import time
from collections.abc import Callable

from rich.console import Console
from rich.live import Live
from rich.text import Text

_SECONDS_BETWEEN_LINES = 20.0


class BenchProgress:
    """Display of the case that is compiled or timed; every line begins with the network's name."""

    def __init__(self, console: Console, network: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._network, self._clock = console, network, clock
        self._last_line = clock()
        self._live: Live | None = None
        if console.is_terminal:
            # Drawn only by these calls: a thread that refreshes it would disturb the timing.
            self._live = Live(console=console, auto_refresh=False, transient=True)
            self._live.start()

    def preparing(self, number: int, count: int, name: str) -> None:
        """Show that a case, counted from 0, is about to be compiled."""
        self._show(f"{self._network}: compiling {number + 1}/{count}, {name}", always=True)

    def turn(self, number: int, count: int, name: str) -> None:
        """Show that a case is about to be timed, in a round counted from 0."""
        self._show(f"{self._network}: round {number + 1}/{count}, {name}", always=False)

    def close(self) -> None:
        """Remove the changing line."""
        if self._live is not None:
            self._live.stop()

    def _show(self, text: str, always: bool) -> None:
        if self._live is not None:
            self._live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)
        elif always or self._clock() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = self._clock()
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)
