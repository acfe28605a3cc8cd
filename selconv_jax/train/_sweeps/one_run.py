"""One run of a sweep, in this process; what goes wrong with it is told, and costs no other."""

import contextlib
import gc
import traceback

from rich.console import Console

from selconv_jax.errors import SelconvError
from selconv_jax.train._loop import RunContext, resume_run, train_run
from selconv_jax.train._sweeps.configurations import SweepRun

__all__ = ["make_run", "one_line"]


def make_run(run: SweepRun, console: Console, context: RunContext | None = None) -> tuple[int, str]:
    """Make a run, or resume it, in this process.

    Args:
        run: The run.
        console: Where its progress is shown.
        context: See `train_run`.

    Returns:
        0 when it is complete, 1 when it has failed, 128 plus the signal's number when it was asked to stop;
        and the error in one line. The traceback of what is no fault of the user's goes to `SweepRun.log`.
    """
    try:
        if run.has_started:
            return resume_run(run.workdir, console, context=context), ""
        return train_run(run.config, run.workdir, console, context), ""
    except SelconvError as error:
        return 1, one_line(error)
    except Exception as error:  # out of memory, say: the other runs may fit
        text, more = traceback.format_exc(), ""
        with contextlib.suppress(OSError):  # the disk may be what has failed
            run.log.parent.mkdir(parents=True, exist_ok=True)
            with run.log.open("a", encoding="utf-8") as log:
                log.write(text)
            more = f" (more in {run.log})"
        gc.collect()  # frees what the run held on the devices
        return 1, f"{type(error).__name__}: {one_line(error)}{more}"


def one_line(error: Exception) -> str:
    """Return what an error says, shortened to its first line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
