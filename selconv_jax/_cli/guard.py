"""The process of a command: flushed output, errors in one line, quiet interruption."""

import contextlib
import io
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator

from selconv_jax._utils.console import discard
from selconv_jax.errors import SelconvError

DEBUG = "SELCONV_DEBUG"
"""Environment variable that requests tracebacks, unless it is empty or 0."""

# Silences the C++ logs of XLA and the TPU compiler: pages on processor features when a program comes from the
# cache, warnings of missing TPUs. Errors arrive as exceptions; fatal messages are written all the same.
_QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3"}

_LETTERS = 300  # of a foreign message; some contain whole specifications


def _is_debugging() -> bool:
    return os.environ.get(DEBUG, "0") not in ("", "0")


def prepare_process(*, debug: bool) -> None:
    """Set up streams, logs and exception hooks so that only this program's own lines are shown.

    ``debug`` asks for tracebacks and what the compilers say, also of processes that this one starts.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # A file opened later would get this descriptor, and with it the stream's output.
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if debug:
        os.environ[DEBUG] = "1"
    if _is_debugging():
        return
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "1":
        # JAX sets this in every process that imports it, and child processes inherit it.
        del os.environ["TF_CPP_MIN_LOG_LEVEL"]
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # as of a cache folder that cannot be written
    threading.excepthook = lambda failure: _say(f"error in {failure.thread}: {described(failure.exc_value)}")
    sys.unraisablehook = lambda failure: None


def guarded(action: Callable[[], int], *, keeps_results: bool) -> int:
    """Run a command and report any error in one line; if results are in files, what it prints may be lost.

    Returns the command's code; 1 for an error, 130 for Ctrl-C, 141 if the reader of its output has gone.
    """
    try:
        code = action()
        ignored = (OSError, ValueError) if keeps_results else ()
        with contextlib.suppress(*ignored):
            sys.stdout.flush()
    except SelconvError as error:
        _show(error)
        _say(f"error: {error}")
        code = 1
    except BrokenPipeError:  # the reader of the output has closed the pipe
        code = 141
    except KeyboardInterrupt:
        _say("interrupted")
        code = 130
    except Exception as error:
        if any(isinstance(each, KeyboardInterrupt) for each in _chain(error)):
            _say("interrupted")
            return 130
        _show(error)
        code, missing = 1, error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and not missing.startswith("selconv_jax"):
            needed = "commands need the extra `train`: pip install 'selconv-jax[train]'."
            _say(f"error: the package {missing} is not installed; {needed}")
        elif problem := _no_device():
            _say(f"error: {problem}")
        else:
            _say(f"error: {described(error)} (`--debug` or {DEBUG}=1 shows where it comes from)")
    finally:
        # Buffered output must not fail while the interpreter ends.
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                discard(stream)
    return code


def described(error: BaseException | None) -> str:
    """Format an exception in one line: ours as it is, others as type and truncated first line."""
    if isinstance(error, SelconvError):
        return str(error)
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if len(line) > _LETTERS:
        line = line[:_LETTERS] + "..."
    if not line and error is not None and (frames := traceback.extract_tb(error.__traceback__)):
        line = f"line {frames[-1].lineno} of {frames[-1].filename}"
    return f"{type(error).__name__}: {line or 'no reason given'}"


def _no_device() -> str:
    """Say that JAX finds no device for JAX_PLATFORMS, if so: what fails then may be anything."""
    asked, jax = os.environ.get("JAX_PLATFORMS"), sys.modules.get("jax")
    if not asked or jax is None:
        return ""
    try:
        jax.devices()
    except Exception as error:
        reason = f" ({described(error).partition(' (set JAX')[0]})" if str(error) else ""
        return (
            f"JAX has no device for JAX_PLATFORMS={asked}{reason}. Unset it, or install the extra `cuda` or "
            "`tpu`: pip install 'selconv-jax[cuda]'."
        )
    return ""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _show(error: BaseException) -> None:
    if _is_debugging():
        with contextlib.suppress(OSError, ValueError):
            traceback.print_exception(error)


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(f"selconv: {text}", file=sys.stderr, flush=True)
