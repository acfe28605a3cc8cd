"""One run of a sweep in its own process: ``python -m selconv_jax.train._sweeps.process``.

The run is a line of JSON on standard input, which stays open as long as the sweep is running.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import tomllib
from pathlib import Path

from selconv_jax._utils.console import progress_console
from selconv_jax.train._config import parse_config
from selconv_jax.train._sweeps.configurations import SweepRun
from selconv_jax.train._sweeps.one_run import make_run

__all__ = ["main"]


def main() -> int:
    """Make the run; return the code of `make_run`, after printing a failure as the last line."""
    order = json.loads(sys.stdin.readline())
    run = SweepRun(
        order["configuration"], parse_config(tomllib.loads(order["config"])), Path(order["workdir"])
    )
    threading.Thread(target=_stop_with_sweep, daemon=True).start()
    code, error = make_run(run, progress_console())
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
    sys.exit(main())
