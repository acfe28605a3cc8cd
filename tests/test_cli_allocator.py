"""The program starts itself anew with settings of the C library, once, and only where they are its own."""

import os
import subprocess
import sys

import pytest

from selconv_jax._cli.guard import TUNABLES, restart_command


def test_restart_keeps_the_command_line_and_the_environment():
    arguments = ["/any/python", "-X", "dev", "-m", "selconv_jax", "train", "a b.toml"]
    command, environ = restart_command({"HOME": "h"}, arguments, "linux")
    assert command == [sys.executable, *arguments[1:]]
    assert environ == {"HOME": "h", "GLIBC_TUNABLES": TUNABLES}
    assert restart_command(environ, arguments, "linux") is None


def test_nothing_is_changed_elsewhere_or_against_the_users_settings():
    assert restart_command({}, ["python"], "darwin") is None
    assert restart_command({"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"}, ["python"], "linux") is None


@pytest.mark.skipif(sys.platform != "linux", reason="settings of Linux")
def test_a_command_runs_once_after_the_restart(tmp_path):
    environ = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    command = [sys.executable, "-m", "selconv_jax", "eval", str(tmp_path / "nothing")]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.count("selconv: error:") == 1
