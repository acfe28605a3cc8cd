"""Entry point of ``selconv``: parse the command line, run the command, return the exit code."""

import argparse
import importlib
import signal
import threading
from collections.abc import Callable, Sequence

# The module and the function of each command.
_HANDLERS = {
    "train": ("runs", "train"),
    "resume": ("runs", "resume"),
    "eval": ("runs", "evaluate"),
    "compact": ("runs", "compact"),
    "export": ("export", "run"),
    "show": ("runs", "show"),
    "sweep": ("sweep", "run"),
    "bench": ("bench", "run"),
    "compile": ("compile", "run"),
    "models": ("models", "run"),
    "data": ("data", "run"),
}

# Commands that take KEY=VALUE.
_CONFIGURABLE = ("train", "resume", "eval", "compact", "export", "sweep", "bench", "compile")

# Commands that spend their time in compiled programs.
_COMPUTING = ("train", "resume", "eval", "sweep", "bench")

# Commands that write their results to files, and print progress only.
_KEEPING = ("train", "resume", "sweep", "bench")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: The command line without the program's name; None: that of the process.

    Returns:
        The exit code: 0; 1 for a user-fixable error; 2 for a wrong command line; 128 plus the
        number of the signal that ended it.
    """
    if arguments is not None:
        return _main(arguments)
    interrupt_at_once()
    code = _main(None)
    interrupt_at_once()
    return code


def _main(arguments: Sequence[str] | None) -> int:
    # Imported only now that Ctrl-C is handled.
    from selconv_jax._cli.arguments import make_parser
    from selconv_jax._cli.guard import guarded, prepare_process
    from selconv_jax._utils.process import restart_for_cpu

    parser = make_parser()
    # argparse takes no positional arguments after an option into a list, so overrides are collected here.
    options, rest = parser.parse_known_args(arguments)
    if rest and (options.command not in _CONFIGURABLE or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.words = [*options.words, *rest]
    if arguments is None:
        prepare_process(debug=options.debug)
        if options.command in _COMPUTING:
            restart_for_cpu()
    return guarded(lambda: _run(options), keeps_results=options.command in _KEEPING)


def _run(options: argparse.Namespace) -> int:
    # Imported only now: the help and a wrong command line should not wait for JAX.
    module, function = _HANDLERS[options.command]
    command = getattr(importlib.import_module(f"selconv_jax._cli.{module}"), function)
    interrupt_in_order()
    return command(options)


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
