"""Several processes of one run on this machine."""

import contextlib
import socket
import subprocess
import sys
import time
from pathlib import Path

from runs import environment

TESTS = Path(__file__).resolve().parent


def free_address():
    """An address on this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def cluster_arguments(count):
    """For each process, what tells it of the others."""
    address = free_address()
    return [
        ["--coordinator", address, "--process", str(number), "--processes", str(count)]
        for number in range(count)
    ]


def announcements(count, launcher):
    """For each process, the environment variables by which Slurm or Open MPI would tell it of the others."""
    with socket.socket() as probe:
        # Both make the port of the number of the job, one of these.
        job = next(job for job in range(4096) if probe.connect_ex(("127.0.0.1", 61440 + job)) != 0)
    if launcher == "Slurm":
        return [
            {
                "SLURM_JOB_ID": str(job),
                "SLURM_STEP_NODELIST": "localhost",
                "SLURM_NTASKS": str(count),
                "SLURM_PROCID": str(number),
                "SLURM_LOCALID": str(number),
            }
            for number in range(count)
        ]
    return [
        {
            "OMPI_VERSION": "4.1.6",
            "OMPI_MCA_orte_hnp_uri": f"{job * 4096}.0;tcp://127.0.0.1:40000",
            "OMPI_COMM_WORLD_SIZE": str(count),
            "OMPI_COMM_WORLD_RANK": str(number),
            "OMPI_COMM_WORLD_LOCAL_RANK": str(number),
        }
        for number in range(count)
    ]


class Processes:
    """Processes of one run; killed on leaving, their output kept in files.

    Args:
        commands: A command line for each.
        folder: For their output.
        variables: For each, more environment variables; None: no more.
    """

    def __init__(self, commands, folder, variables=None):
        folder.mkdir(parents=True, exist_ok=True)
        self.files = [folder / f"{number}.txt" for number in range(len(commands))]
        self.started = []
        variables = variables or [{} for _ in commands]
        for command, file, more in zip(commands, self.files, variables, strict=True):
            with file.open("w") as output:
                self.started.append(
                    subprocess.Popen(
                        list(map(str, command)),
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        env={**environment(), **more},
                        stdin=subprocess.DEVNULL,
                    )
                )

    def __enter__(self):
        return self

    def __exit__(self, *details):
        for process in self.started:
            process.kill()
            process.wait()

    def wait(self, timeout):
        """The exit codes of all, which must come within so many seconds."""
        end = time.monotonic() + timeout
        codes = []
        for process in self.started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(end - time.monotonic(), 0.1))
            codes.append(process.poll())
        assert None not in codes, f"still running after {timeout} s: {codes}\n{self.outputs()}"
        return codes

    def text(self, number):
        """What a process has printed so far."""
        return self.files[number].read_text(errors="replace")

    def outputs(self):
        """What all have printed, with headings."""
        return "\n".join(f"--- process {number}\n{self.text(number)}" for number in range(len(self.files)))

    def wait_for_text(self, number, text, timeout=120):
        """Returns when a process has printed a text."""
        end = time.monotonic() + timeout
        while text not in self.text(number):
            assert time.monotonic() < end, f"{text!r} did not come\n{self.outputs()}"
            assert self.started[number].poll() is None, self.outputs()
            time.sleep(0.05)

    def wait_for_file(self, path, timeout=120):
        """Returns when there is such a file or folder."""
        end = time.monotonic() + timeout
        while not path.exists():
            assert time.monotonic() < end, f"{path} did not come\n{self.outputs()}"
            time.sleep(0.05)


def selconv(count, folder, *arguments, launcher=None):
    """A command of the program in so many processes, told of each other by arguments or as by a launcher."""
    program = [sys.executable, "-m", "selconv_jax", *arguments]
    if launcher is not None:
        return Processes([program] * count, folder, announcements(count, launcher))
    return Processes([[*program, *more] for more in cluster_arguments(count)], folder)


def script(count, folder, name, *arguments):
    """A script of the tests in so many processes, with the arguments of the cluster after its own."""
    program = [sys.executable, TESTS / name, *arguments]
    return Processes([[*program, *more] for more in cluster_arguments(count)], folder)
