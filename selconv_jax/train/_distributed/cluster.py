"""Joining the processes of a run, and a clear error when one of them is lost.

JAX's distributed runtime connects the processes, monitors their heartbeats, and ends all of them with a
message that names the one that died.
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping

import jax

from selconv_jax.errors import ConfigError, SelconvError

HEARTBEAT_SECONDS = 20  # a process that sends none for this long is considered dead, and the run ends
_MARGIN = 5.0


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Address and number of this process among the others; None: detected from the environment.

    Attributes:
        coordinator: ``"HOST:PORT"`` at which all can reach process 0.
        process: Index of this process, from 0.
        processes: Number of processes.
        timeout: Seconds within which all processes must have joined.
    """

    coordinator: str | None = None
    process: int | None = None
    processes: int | None = None
    timeout: float = 50.0

    def __post_init__(self) -> None:
        if not 0 < self.timeout < math.inf:
            raise ConfigError(f"--join-timeout is {self.timeout}; it must be a number of seconds above 0.")
        given = {"--coordinator": self.coordinator, "--process": self.process, "--processes": self.processes}
        missing = [name for name, value in given.items() if value is None]
        if 0 < len(missing) < len(given):
            are = "is" if len(missing) == 1 else "are"
            raise ConfigError(f"{', '.join(given)} belong together; {' and '.join(missing)} {are} missing.")
        if self.coordinator is not None:
            host, _, port = self.coordinator.rpartition(":")
            if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
                raise ConfigError(f"--coordinator is {self.coordinator!r}; it must be HOST:PORT.")
        if self.processes is not None and self.process is not None:
            if self.processes < 1:
                raise ConfigError(f"--processes is {self.processes}; it must be at least 1.")
            if not 0 <= self.process < self.processes:
                raise ConfigError(
                    f"--process is {self.process}; it must be one of 0 to {self.processes - 1} "
                    f"(--processes is {self.processes})."
                )


def announced(environment: Mapping[str, str]) -> str | None:
    """Detect ``"Slurm"``, ``"Open MPI"`` or ``"TPU pod"`` where the job has more than one process."""

    def number(name: str) -> int:
        value = environment.get(name, "")
        return int(value) if value.isdecimal() else 1

    if "SLURM_JOB_ID" in environment and "SLURM_PROCID" in environment and number("SLURM_NTASKS") > 1:
        return "Slurm"
    if number("OMPI_COMM_WORLD_SIZE") > 1:
        return "Open MPI"
    hosts = [host for host in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
    if len(hosts) > 1 or "MEGASCALE_COORDINATOR_ADDRESS" in environment:
        return "TPU pod"
    return None


def local_gpus(environment: Mapping[str, str]) -> list[int] | None:
    """Select the GPUs of this process, by index into the visible ones; None: JAX's default is right.

    JAX takes the GPU whose index is the rank of the process on its machine. That GPU does not exist if each
    process sees only its own, and it is one of many if a process has the machine to itself.

    Example:
        >>> local_gpus({"SLURM_LOCALID": "3", "CUDA_VISIBLE_DEVICES": "3"})
        [0]
        >>> local_gpus({"SLURM_STEP_TASKS_PER_NODE": "1(x4)", "CUDA_VISIBLE_DEVICES": "0,1"})
        [0, 1]
    """
    names = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
    visible = next((environment[name] for name in names if environment.get(name)), "")
    count = len([device for device in visible.split(",") if device])
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    alone = re.match(r"1(?!\d)", tasks) or environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    if alone and not count:
        count = int(environment.get("SLURM_GPUS_ON_NODE") or 0)
    return list(range(count)) if count == 1 or (count and alone) else None


def _is_tpu_host() -> bool:
    """Return whether JAX uses TPU chips here; the machine may belong to a pod that no variable announces."""
    # JAX sets the variable when it is imported on a machine without TPU chips.
    has_chips = "TPU_SKIP_MDS_QUERY" not in os.environ and importlib.util.find_spec("libtpu") is not None
    return has_chips and (jax.config.jax_platforms or "tpu").split(",")[0] == "tpu"


@contextlib.contextmanager
def join(cluster: Cluster, *, shares_stops: bool = True) -> Iterator[None]:
    """Join the processes of a run while the context is entered; call before JAX first uses a device.

    If the cluster is empty and the environment announces none, the process is alone, and nothing happens.
    With ``shares_stops``, SIGTERM is left to a `SharedStopRequest`; else it ends the process.

    Raises:
        ConfigError: The coordinator does not answer.
    """
    told = cluster.coordinator is not None or announced(os.environ) is not None
    if cluster.processes == 1 or not (told or _is_tpu_host()):
        yield
        return
    jax.config.update("jax_enable_preemption_service", shares_stops)
    if cluster.coordinator is not None and cluster.process != 0:
        _await_coordinator(cluster.coordinator, cluster.timeout)
    deadline = _start_timer(cluster.timeout + _MARGIN, lambda: _late(cluster))
    try:
        jax.distributed.initialize(
            cluster.coordinator,
            cluster.processes,
            cluster.process,
            local_device_ids=local_gpus(os.environ),
            # The runtime kills the process without telling Python; our deadline comes first.
            initialization_timeout=round(cluster.timeout + 4 * _MARGIN),
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        if told or "coordinator_address" not in str(error):
            raise ConfigError(
                f"the processes{_of(announced(os.environ))} could not be joined: {error} Where JAX does not "
                "find them by itself, --coordinator, --process and --processes tell it."
            ) from error
    finally:
        deadline.cancel()
    try:
        with _ended_by_loss():
            yield
        jax.distributed.shutdown()
    except BaseException:
        # A process that failed alone must not wait for the others, which wait for it.
        _start_timer(_MARGIN, lambda: os._exit(1))
        raise


@contextlib.contextmanager
def _ended_by_loss() -> Iterator[None]:
    """Turn a failed collective into one clear error.

    The remaining processes notice a loss at different times and with different errors, none of which names
    the lost process. The runtime does after the heartbeat timeout, and ends this process, which waits.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError, SelconvError) as error:
        # A checkpoint that waits for another process's part fails with a SelconvError.
        cause = error.__cause__ if isinstance(error, SelconvError) else error
        if cause is None or not _is_loss(cause):
            raise
        _say(
            f"error: process {jax.process_index()} of {jax.process_count()} can no longer reach another "
            "one, which has died or lost its connection. Its number, or that the leader was lost, which is "
            f"process 0, follows within {2 * HEARTBEAT_SECONDS} seconds. Start all processes again with "
            f"`selconv resume` to resume from the last checkpoint. ({str(error).splitlines()[0]})"
        )
        with contextlib.suppress(OSError):
            _shorten_last_words()
        time.sleep(2 * HEARTBEAT_SECONDS)
        os._exit(1)


# Condenses the runtime's thirty lines of C++ output into one line that names the lost process.
_LAST_WORDS = r"""
import re, sys
text = sys.stdin.buffer.read().decode(errors="replace")
lost = re.search(r"(?:unhealthy|stopped sending heartbeats)[^\n]*\n(\d[\d, ]*)\n", text)
if lost:
    text = f"selconv: error: lost: process {lost[1]}\n"
elif re.search("Failed to send RPC to coordination service|leader", text):
    text = "selconv: error: lost: process 0, the leader\n"
sys.stderr.write(text)
"""


def _shorten_last_words() -> None:
    """Redirect standard error to a child process that outlives this one and condenses the output."""
    if os.environ.get("SELCONV_DEBUG", "0") not in ("", "0"):
        return
    words = subprocess.Popen([sys.executable, "-I", "-c", _LAST_WORDS], stdin=subprocess.PIPE)
    assert words.stdin is not None
    os.dup2(words.stdin.fileno(), 2)
    words.stdin.close()


def _is_loss(error: BaseException) -> bool:
    text = str(error)
    if any(word in text for word in ("Duplicate GPU", "invalid usage", "out of memory")):
        return False  # concerns this process alone
    return any(word in text for word in ("Gloo", "UNAVAILABLE", "DEADLINE_EXCEEDED", "NCCL", "ABORTED"))


def _await_coordinator(address: str, timeout: float) -> None:
    host, _, port = address.rpartition(":")
    end = time.monotonic() + timeout
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=2.0):
                return
        except OSError as error:
            if time.monotonic() > end:
                raise ConfigError(
                    f"the coordinator {address} does not answer ({error}; tried for {timeout:.0f} seconds). "
                    "Start process 0 there, with the same --coordinator, and see that the port is open."
                ) from None
        time.sleep(0.2)


def _late(cluster: Cluster) -> None:
    count = _of(announced(os.environ)) if cluster.processes is None else ""
    remedy = "Start them all, by srun, mpirun or on every host of the pod, where they can reach the first one"
    if cluster.processes is not None:
        remedy = f"Start all {cluster.processes} processes of --processes, each with its own --process"
    _say(
        f"error: not all processes{count} have come within {cluster.timeout:.0f} seconds. {remedy}, or give "
        "them longer by --join-timeout."
    )
    os._exit(1)


def _of(kind: str | None) -> str:
    return "" if kind is None else f" of the {kind}" if kind == "TPU pod" else f" of the {kind} job"


def _start_timer(seconds: float, action: Callable[[], None]) -> threading.Timer:
    timer = threading.Timer(seconds, action)
    timer.daemon = True
    timer.start()
    return timer


def _say(text: str) -> None:
    print(f"selconv: {text}", file=sys.stderr, flush=True)
