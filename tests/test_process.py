"""The program starts itself anew with settings for CPU, once, and only where they are its own."""

import os
import subprocess
import sys

import pytest

from selconv_jax._utils import process
from selconv_jax._utils.process import BARRIERS, TUNABLES, restart_command


@pytest.fixture(autouse=True)
def newest(monkeypatch):
    """A compiler that keeps barriers."""
    monkeypatch.setattr(process, "_drops_barriers", lambda: False)


def test_restart_keeps_the_command_line_and_the_environment():
    arguments = ["/any/python", "-X", "dev", "-m", "selconv_jax", "train", "a b.toml"]
    command, environ = restart_command({"HOME": "h"}, arguments, "linux")
    assert command == [sys.executable, *arguments[1:]]
    assert environ == {"HOME": "h", "GLIBC_TUNABLES": TUNABLES}
    assert restart_command(environ, arguments, "linux") is None


def test_nothing_is_changed_elsewhere_or_against_the_users_settings():
    assert restart_command({}, ["python"], "darwin") is None
    assert restart_command({"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"}, ["python"], "linux") is None


def test_barriers_are_kept_where_the_compiler_would_drop_them(monkeypatch):
    monkeypatch.setattr(process, "_drops_barriers", lambda: True)
    given = {"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": "", "XLA_FLAGS": "--xla_a=1"}
    _, environ = restart_command(given, ["python"], "linux")
    assert environ == {**given, "XLA_FLAGS": f"--xla_a=1 {BARRIERS}"}
    assert restart_command(environ, ["python"], "linux") is None
    assert restart_command({**given, "JAX_PLATFORMS": "cuda"}, ["python"], "linux") is None
    own = {**given, "XLA_FLAGS": "--xla_disable_hlo_passes=dce"}
    assert restart_command(own, ["python"], "linux") is None
    found = []
    monkeypatch.setattr(process.importlib.util, "find_spec", lambda name: found.append(name) or object())
    del given["JAX_PLATFORMS"]
    assert restart_command(given, ["python"], "linux") is None
    assert found


@pytest.mark.parametrize("version", ["0.10.0", "0.10.1", "0.11.0", "0.12.0.1", "1.0"])
def test_versions_of_the_compiler(version, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(process.importlib.metadata, "version", lambda name: version)
    assert process._drops_barriers() == version.startswith("0.10")


def test_a_compiler_of_unknown_version_is_taken_for_a_new_one(monkeypatch):
    monkeypatch.undo()

    def missing(name):
        raise process.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(process.importlib.metadata, "version", missing)
    assert not process._drops_barriers()
    monkeypatch.setattr(process.importlib.metadata, "version", lambda name: "unknown")
    assert not process._drops_barriers()


def test_a_value_behind_a_barrier_is_computed_once():
    """With the settings, whatever the version of the compiler."""
    code = (
        "import selconv_jax; selconv_jax.restart_for_cpu()\n"
        "import jax, jax.numpy as jnp\n"
        "from selconv_jax._xla.materialize import materialize\n"
        "def function(x):\n"
        "    y = materialize(jnp.sin(x))\n"
        "    return y + 1, y * 3\n"
        "text = jax.jit(function).lower(jnp.ones((512, 512))).compile().as_text()\n"
        "print(text.count(' sine('))\n"
    )
    settings = ("GLIBC_TUNABLES", "XLA_FLAGS")
    environ = {name: value for name, value in os.environ.items() if name not in settings}
    environ["JAX_PLATFORMS"] = "cpu"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["1"], done.stderr


def test_a_program_from_standard_input_goes_on():
    code = "import selconv_jax; selconv_jax.restart_for_cpu(); print('done')\n"
    environ = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-"], input=code, env=environ, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "done\n", done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="settings of Linux")
@pytest.mark.parametrize(
    ("package", "missing"),
    [("data", "PIL"), ("report", "matplotlib"), ("train", "msgspec")],
)
def test_parts_that_need_an_extra_name_it(package, missing):
    code = f"import sys; sys.modules[{missing!r}] = None\nfrom selconv_jax.{package} import *"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert f"the package {missing} is not installed; it comes with the extra `train`: pip install" in last


def test_a_command_runs_once_after_the_restart(tmp_path):
    environ = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    command = [sys.executable, "-m", "selconv_jax", "eval", str(tmp_path / "nothing")]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.count("selconv: error:") == 1
