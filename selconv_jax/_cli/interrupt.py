"""Handling of Ctrl-C while the program starts and ends; imports nothing else, to be set early."""

import signal
import threading
from collections.abc import Callable

__all__ = ["interrupt_at_once", "interrupt_in_order"]


def interrupt_at_once() -> None:
    """Let Ctrl-C end the process at once, as an exception may be mishandled by a module being imported."""
    _exchange_handler(signal.default_int_handler, signal.SIG_DFL)


def interrupt_in_order() -> None:
    """Let Ctrl-C raise `KeyboardInterrupt` again."""
    _exchange_handler(signal.SIG_DFL, signal.default_int_handler)


def _exchange_handler(old: object, new: Callable[..., object] | signal.Handlers) -> None:
    """Replace the handler of Ctrl-C, unless someone else has set one."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is old:
        signal.signal(signal.SIGINT, new)
