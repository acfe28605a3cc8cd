"""One run of a sweep, in this process or as one of its own: ``python -m selconv_jax.train._sweeps.one_run``.

In its own process the run is a line of JSON on standard input, which stays open as long as the sweep runs.
"""

import contextlib
import gc
import json
import os
import signal
import sys
import threading
import tomllib
import traceback
from pathlib import Path

from rich.console import Console

from selconv_jax._utils.console import progress_console
from selconv_jax.errors import SelconvError
from selconv_jax.train._config import parse_config
from selconv_jax.train._config_changes import free_overrides
from selconv_jax.train._loop import RunContext, new_run, resumed_run
from selconv_jax.train._seeds.requests import Requests, answered_alone
from selconv_jax.train._sweeps.configurations import SweepRun


def make_run(run: SweepRun, console: Console) -> tuple[int, str]:
    """Train or resume a run in this process; a failure is reported and does not end the others.

    Returns:
        0 when it is complete, 1 when it has failed, 128 plus the signal number when a signal stopped it;
        and the error in one line. The traceback of an unexpected error goes to `SweepRun.log`.
    """
    return answered_alone(run_of_sweep(run, RunContext(console)))


def run_of_sweep(run: SweepRun, context: RunContext) -> Requests[tuple[int, str]]:
    """Train or resume as `make_run` does, with the computations left to whoever answers the requests."""
    try:
        if run.has_started:
            return (yield from resumed_run(run.workdir, context, free_overrides(run.config))), ""
        return (yield from new_run(run.config, run.workdir, context)), ""
    except SelconvError as error:
        return 1, one_line(error)
    except Exception as error:  # such as out of memory: the other runs may fit
        more = f" (more in {run.log})" if run.write_log(traceback.format_exc()) else ""
        gc.collect()  # frees the run's memory on the devices
        return 1, f"{type(error).__name__}: {one_line(error)}{more}"


def one_line(error: Exception) -> str:
    """Return the first line of an error message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")


def _main() -> int:
    """Make the run of standard input; return its code, after printing a failure as the last line."""
    order = json.loads(sys.stdin.readline())
    config = parse_config(tomllib.loads(order["config"]))
    threading.Thread(target=_stop_with_sweep, daemon=True).start()
    code, error = make_run(
        SweepRun(order["configuration"], config, Path(order["workdir"])), progress_console()
    )
    if error:
        with contextlib.suppress(OSError):  # the disk itself may have failed
            print(f"failed: {error}", flush=True)
    return code


def _stop_with_sweep() -> None:
    """Stop the run, which is then saved as after a signal, if the sweep's process has been killed."""
    # Not through `sys.stdin`, whose lock would be held while the interpreter ends.
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(_main())
