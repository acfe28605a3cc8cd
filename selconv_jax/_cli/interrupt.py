"""What Ctrl-C does while the program starts and ends; needs no other module, to be in place early."""

import signal
import threading
from collections.abc import Callable

__all__ = ["interrupt_at_once", "interrupt_in_order"]


def interrupt_at_once() -> None:
    """Lets Ctrl-C end the process without an exception, of which modules being imported make anything."""
    _exchange_handler(signal.default_int_handler, signal.SIG_DFL)


def interrupt_in_order() -> None:
    """Lets Ctrl-C raise `KeyboardInterrupt` again."""
    _exchange_handler(signal.SIG_DFL, signal.default_int_handler)


def _exchange_handler(old: object, new: Callable[..., object] | signal.Handlers) -> None:
    """Replace what is done about Ctrl-C, unless somebody else has decided on it."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is old:
        signal.signal(signal.SIGINT, new)
