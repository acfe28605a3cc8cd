"""How commands end: what is not ours in one line, its traceback on demand, results that cannot be written."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from runs import command, environment
from selconv_jax._cli import guard
from selconv_jax._cli import main as entry
from selconv_jax._cli.main import main
from selconv_jax.errors import ConfigError

FULL = Path("/dev/full")


def fail(error, cause=None):
    def action(*arguments):
        raise error from cause

    return action


def python(program, **options):
    options = {"capture_output": True, "text": True, "check": False} | options
    return subprocess.run([sys.executable, "-c", program], env=environment(), **options)


@pytest.mark.parametrize("debug", ["", "0", "1"])
def test_what_is_not_ours_is_one_line(debug, monkeypatch, capsys):
    monkeypatch.setenv(guard.DEBUG, debug)
    error = RuntimeError("first line\nsecond line")
    assert guard.guarded(fail(error), keeps_results=False) == 1
    captured = capsys.readouterr()
    *traceback, line = captured.err.splitlines()
    assert line == (
        "selconv: error: RuntimeError: first line (`--debug` or SELCONV_DEBUG=1 shows where it comes from)"
    )
    assert bool(traceback) == (debug == "1")
    assert captured.out == ""


def test_an_error_without_a_message_says_where_it_is(capsys):
    assert guard.guarded(fail(AssertionError()), keeps_results=False) == 1
    assert re.match(
        r"selconv: error: AssertionError: line \d+ of .*test_cli_guard\.py ", capsys.readouterr().err
    )
    assert guard.described(AssertionError()) == "AssertionError: no reason given"


def test_platforms_that_jax_does_not_have(monkeypatch, capsys):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    for devices, said in (
        (fail(AssertionError()), "JAX has no device for JAX_PLATFORMS=cuda. Unset it, or install the extra"),
        (lambda: [], "AssertionError: line"),
    ):
        monkeypatch.setattr("jax.devices", devices)
        assert guard.guarded(fail(AssertionError()), keeps_results=False) == 1
        assert f"selconv: error: {said}" in capsys.readouterr().err
    done = subprocess.run(
        command("models"), env=environment() | {"JAX_PLATFORMS": "nosuch"}, capture_output=True, text=True
    )
    (line,) = done.stderr.splitlines()
    assert "no device for JAX_PLATFORMS=nosuch (RuntimeError: Unable to initialize backend 'nosuch'" in line


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path):
    """Both of compiled programs and of Matplotlib."""
    (tmp_path / "file").touch()
    program = (
        "from selconv_jax._cli.guard import prepare_process\n"
        "prepare_process(debug=False)\n"
        "import jax, matplotlib\n"
        "from selconv_jax._cli.runs import share_compilations\n"
        "share_compilations()\n"
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)\n"
        "jax.jit(lambda x: 2 * x)(1.0)\n"
        "matplotlib.get_cachedir()\n"
    )
    for given in ({}, {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "file")}):
        env = environment() | {"XDG_CACHE_HOME": str(tmp_path / "file")}
        del env["JAX_COMPILATION_CACHE_DIR"]
        done = subprocess.run(
            [sys.executable, "-c", program], env=env | given, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0
        (line,) = done.stderr.splitlines()
        assert re.match(r"selconv: compiled programs are not kept, as .*file.* cannot be written \(", line)


def test_a_long_message_is_cut(capsys):
    assert guard.guarded(fail(ValueError("x" * 5000)), keeps_results=True) == 1
    assert len(capsys.readouterr().err) < 450


def test_ours_are_whole(capsys):
    assert guard.guarded(fail(ConfigError("epochs is 0.\nSay more.")), keeps_results=False) == 1
    assert capsys.readouterr().err == "selconv: error: epochs is 0.\nSay more.\n"


@pytest.mark.parametrize(
    "action", [fail(KeyboardInterrupt()), fail(ImportError("half made"), KeyboardInterrupt())]
)
def test_interrupted(action, capsys):
    """Also where a library made another error of it."""
    assert guard.guarded(action, keeps_results=False) == 130
    assert capsys.readouterr().err == "selconv: interrupted\n"


@pytest.mark.parametrize("arguments", [["--debug", "models", "nosuch"], ["models", "nosuch", "--debug"]])
def test_debug_before_and_after_the_command(arguments):
    done = subprocess.run(command(*arguments), env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("selconv: error: there is no model 'nosuch'")


def test_a_command_shows_no_traceback(monkeypatch, capsys):
    monkeypatch.setattr("selconv_jax._cli.models.run", fail(RecursionError("deep")))
    assert main(["models"]) == 1
    assert capsys.readouterr().err.startswith("selconv: error: RecursionError: deep (`--debug`")


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("matplotlib", "error: the package matplotlib is not installed; .*'selconv-jax\\[train\\]'"),
        ("selconv_jax.nowhere", "error: ModuleNotFoundError"),  # a fault of ours, which no extra mends
    ],
)
def test_a_package_that_is_not_installed(monkeypatch, capsys, missing, message):
    error = ModuleNotFoundError(f"No module named {missing!r}", name=missing)
    monkeypatch.setattr("selconv_jax._cli.models.run", fail(error))
    assert main(["models"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"selconv: {message}", line)


@pytest.mark.skipif(not FULL.exists(), reason="needs a full device")
def test_results_that_cannot_be_written():
    with FULL.open("w") as full:
        done = subprocess.run(
            command("data", "list"),
            env=environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("selconv: error: OSError: [Errno 28] No space left on device")


def test_closed_streams_are_nowhere(tmp_path):
    """A file that is opened later must not get the number, and the text, of a closed stream."""
    done = python(
        "import os, sys\n"
        "from selconv_jax._cli.guard import prepare_process\n"
        "os.closerange(0, 3); sys.stdout = sys.stderr = None\n"
        "prepare_process(debug=False)\n"
        "file = open('opened', 'w')\n"
        "print('out', flush=True); print('err', file=sys.stderr, flush=True)\n"
        "os._exit(0 if file.fileno() > 2 else 7)\n",
        cwd=tmp_path,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(("inherited", "level"), [(None, "3"), ("1", "3"), ("0", "0"), ("2", "2")])
def test_level_of_logs_that_jax_leaves_behind_is_not_a_wish(inherited, level):
    """`import jax` sets 1 for itself and for whatever its process starts; other values are the user's."""
    done = python(
        "import os\n"
        "from selconv_jax._cli.guard import prepare_process\n"
        "os.environ.pop('TF_CPP_MIN_LOG_LEVEL', None)\n"
        f"os.environ.update({{}} if {inherited!r} is None else {{'TF_CPP_MIN_LOG_LEVEL': {inherited!r}}})\n"
        "prepare_process(debug=False)\n"
        "print(os.environ['TF_CPP_MIN_LOG_LEVEL'])\n"
    )
    assert done.stdout == f"{level}\n", done.stderr


def test_help_does_not_wait_for_jax():
    done = python(
        "import sys\n"
        "from selconv_jax._cli.main import main\n"
        "sys.argv = ['selconv', '--help']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "found = [name for name in ('jax', 'numpy', 'rich.progress') if name in sys.modules]\n"
        "sys.exit(str(found) if found else 0)\n"
    )
    assert done.returncode == 0, done.stderr


def test_interrupted_while_modules_are_imported():
    """They may make anything of an exception; the process ends as if it had none to raise."""
    done = python(
        "import os, signal, sys\n"
        "from selconv_jax._cli.main import main\n"
        "class Finder:\n"
        "    def find_spec(name, *more):\n"
        "        if name == 'selconv_jax._cli.models': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder)\n"
        "sys.argv = ['selconv', 'models']\n"
        "main()\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_interrupt_handlers_of_others_stay():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        entry.interrupt_at_once()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        signal.signal(signal.SIGINT, signal.default_int_handler)
        entry.interrupt_at_once()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        entry.interrupt_in_order()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
