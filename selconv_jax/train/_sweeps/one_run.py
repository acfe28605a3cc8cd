"""One run of a sweep, in this process; its failure is reported and does not end the others."""

import contextlib
import gc
import traceback

from rich.console import Console

from selconv_jax.errors import SelconvError
from selconv_jax.train._loop import RunContext, resume_run, train_run
from selconv_jax.train._sweeps.configurations import SweepRun

__all__ = ["make_run", "one_line"]


def make_run(run: SweepRun, console: Console, context: RunContext | None = None) -> tuple[int, str]:
    """Train or resume a run in this process.

    Args:
        run: The run.
        console: Console of its progress.
        context: See `train_run`.

    Returns:
        0 when it is complete, 1 when it has failed, 128 plus the signal number when a signal stopped it;
        and the error in one line. The traceback of an unexpected error goes to `SweepRun.log`.
    """
    try:
        if run.has_started:
            return resume_run(run.workdir, console, context=context), ""
        return train_run(run.config, run.workdir, console, context), ""
    except SelconvError as error:
        return 1, one_line(error)
    except Exception as error:  # such as out of memory: the other runs may fit
        text, more = traceback.format_exc(), ""
        with contextlib.suppress(OSError):  # the disk itself may have failed
            run.log.parent.mkdir(parents=True, exist_ok=True)
            with run.log.open("a", encoding="utf-8") as log:
                log.write(text)
            more = f" (more in {run.log})"
        gc.collect()  # frees the run's memory on the devices
        return 1, f"{type(error).__name__}: {one_line(error)}{more}"


def one_line(error: Exception) -> str:
    """Return the first line of an error message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
