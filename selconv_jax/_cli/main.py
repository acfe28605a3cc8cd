"""Entry point of ``selconv``: parse the command line, run the command, return the exit code."""

import argparse
import importlib
from collections.abc import Sequence

from selconv_jax._cli.interrupt import interrupt_at_once, interrupt_in_order

__all__ = ["main"]


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
    from selconv_jax._cli.allocator import keep_memory
    from selconv_jax._cli.arguments import make_parser
    from selconv_jax._cli.guard import guarded, prepare_process

    parser = make_parser()
    # argparse takes no positional arguments after an option into a list, so overrides are collected here.
    options, rest = parser.parse_known_args(arguments)
    if rest and (
        options.command not in ("train", "resume", "eval", "compact", "export", "sweep", "bench", "compile")
        or any(word.startswith("-") for word in rest)
    ):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.words = [*options.words, *rest]
    if arguments is None:
        prepare_process(debug=options.debug)
        if options.command in _COMPUTING:
            keep_memory()
    return guarded(lambda: _run(options), keeps_results=options.command in _KEEPING)


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

# Commands that spend their time in compiled programs.
_COMPUTING = ("train", "resume", "eval", "sweep", "bench")

# Commands that write their results to files, and print progress only.
_KEEPING = ("train", "resume", "sweep", "bench")


def _run(options: argparse.Namespace) -> int:
    # Imported only now: the help and a wrong command line should not wait for JAX.
    module, function = _HANDLERS[options.command]
    command = getattr(importlib.import_module(f"selconv_jax._cli.{module}"), function)
    interrupt_in_order()
    code: int = command(options)
    return code
