"""Runs of a sweep at once, in processes of their own; and the time that is left.

The processes are small programs here that write what a run writes, as training would take long.
"""

import json
import os
import signal
import sys
import threading
import time

import pytest

from runs import TINY, assert_same_end, quiet_console, tiny_config
from selconv_jax.train._config import dump_config, parse_config
from selconv_jax.train._loop import train_run
from selconv_jax.train._sweeps import runs as sweep_runs
from selconv_jax.train._sweeps.configurations import plan_sweep
from selconv_jax.train._sweeps.runs import run_sweep
from selconv_jax.train._sweeps.time_left import Pace, SweepClock, seconds_left

pytestmark = pytest.mark.optimized

# Seed 1 fails, seed 2 is killed, seeds 3 and 5 work until they are asked to stop and take their time then (5
# more of it), counting the signals; the others are complete at once.
PROGRAM = """
import json, os, signal, sys, time, tomllib
from pathlib import Path
order = json.loads(sys.stdin.readline())
config, workdir = tomllib.loads(order["config"]), Path(order["workdir"])
workdir.mkdir(parents=True, exist_ok=True)
(workdir / "config.toml").write_text(order["config"])
print("memory:", os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"], flush=True)
if config["seed"] == 1:
    print("failed: the loss of step 3 is not finite")
    sys.exit(1)
if config["seed"] == 2:
    os.kill(os.getpid(), signal.SIGKILL)
if config["seed"] in (3, 5):
    signals = []
    signal.signal(signal.SIGTERM, lambda number, frame: signals.append(number))
    (workdir / "ready").touch()
    while not signals:
        time.sleep(0.01)
    (workdir / "asked").touch()
    time.sleep(config["seed"] - 2.5)
    (workdir / "signals").write_text(str(len(signals)))
    sys.exit(128 + signal.SIGTERM)
(workdir / "metrics.jsonl").write_text(json.dumps({"epoch": config["epochs"]}) + "\\n")
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(dump_config(parse_config({**TINY, "epochs": 2})))
    return path


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(sweep_runs, "_COMMAND", (sys.executable, "-c", PROGRAM))
    monkeypatch.setattr(sweep_runs, "_SECONDS_BETWEEN_LOOKS", 0.01)
    monkeypatch.setattr(sweep_runs, "_SECONDS_BETWEEN_LINES", 0.05)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)


def when(paths, action):
    """Does something, in another thread, once all paths exist."""

    def wait():
        while not all(path.exists() for path in paths):
            time.sleep(0.01)
        action()

    threading.Thread(target=wait, daemon=True).start()


def test_runs_at_once_end_as_runs_in_turn(file, tmp_path, fake):
    runs = plan_sweep([file], tmp_path / "sweep", seeds=[0, 1, 2, 4])
    console, text = quiet_console()
    end = run_sweep(runs, console, jobs=3)
    assert end.code == 1
    assert end.failures == {
        "tiny, seed 1": "the loss of step 3 is not finite",
        "tiny, seed 2": f"its process ended by SIGKILL (more in {runs[2].log})",
    }
    assert [run.is_complete for run in runs] == [True, False, False, True]
    assert runs[0].log.read_text() == "memory: false\n"
    assert "memory" not in text.getvalue()  # outputs do not interleave
    assert "run 4 of 4: tiny, seed 4: complete" in text.getvalue()
    assert run_sweep(runs[:1], console, jobs=2).code == 0
    assert "run 1 of 1: tiny, seed 0: complete already" in text.getvalue()


def test_memory_is_shared_as_the_user_says(file, tmp_path, fake, monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
    runs = plan_sweep([file], tmp_path / "sweep", seeds=[0])
    assert run_sweep(runs, quiet_console()[0], jobs=2).code == 0
    assert runs[0].log.read_text() == "memory: true\n"


def test_a_process_that_cannot_be_started_costs_no_other(file, tmp_path, fake):
    runs = plan_sweep([file], tmp_path / "sweep", seeds=[0, 4])
    runs[0].log.mkdir(parents=True)
    end = run_sweep(runs, quiet_console()[0], jobs=2)
    assert end.code == 1
    assert list(end.failures) == ["tiny, seed 0"]
    assert "its process cannot be started: " in end.failures["tiny, seed 0"]
    assert runs[1].is_complete


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_runs_saved_and_once(file, tmp_path, fake, number):
    runs = plan_sweep([file, other(file)], tmp_path / "sweep", seeds=[3, 0])
    runs = [run for run in runs if run.config.seed == 3] + [run for run in runs if run.config.seed == 0]
    console, text = quiet_console()
    when([run.workdir / "ready" for run in runs[:2]], lambda: os.kill(os.getpid(), number))
    end = run_sweep(runs, console, jobs=2)
    assert end.code == 128 + number
    assert end.failures == {}
    assert [(run.workdir / "signals").read_text() for run in runs[:2]] == ["1", "1"]
    assert not any(run.has_started for run in runs[2:])
    assert text.getvalue().count("stopping: 2 runs are being saved") == 1
    assert "epochs of running ones: 0/2, 0/2" in text.getvalue()
    assert "the sweep stopped with 0 of 4 runs complete; resume it with the same command" in text.getvalue()


def other(file):
    path = file.with_name("other.toml")
    path.write_text(file.read_text())
    return path


def test_nothing_is_left_at_work_when_the_user_insists(file, tmp_path, fake):
    (run,) = plan_sweep([file], tmp_path / "sweep", seeds=[5])

    def insist():
        os.kill(os.getpid(), signal.SIGINT)

    when([run.workdir / "ready"], insist)
    when([run.workdir / "asked"], insist)
    with pytest.raises(KeyboardInterrupt):
        run_sweep([run], quiet_console()[0], jobs=2)
    assert (run.workdir / "signals").exists()  # it was waited for


@pytest.mark.slow
def test_process_makes_an_ordinary_run(file, tmp_path):
    runs = plan_sweep([file], tmp_path / "sweep", seeds=[0, 1])
    console, text = quiet_console()
    assert run_sweep(runs, console, jobs=2).code == 0, runs[0].log.read_text()
    alone = tmp_path / "alone"
    assert train_run(tiny_config(epochs=2, seed=1), alone, console) == 0
    assert_same_end(runs[1].workdir, alone)
    assert "epoch 2/2" in runs[1].log.read_text()
    assert "(the sweep has about" not in text.getvalue().splitlines()[-1]


@pytest.mark.slow
def test_process_stops_when_its_sweep_is_gone(file, tmp_path):
    (run,) = plan_sweep([file], tmp_path / "sweep", seeds=[0], overrides=["epochs=1000"])
    process = sweep_runs._start(run)
    end = time.monotonic() + 120
    while not run.epochs_done and time.monotonic() < end and process.poll() is None:
        time.sleep(0.1)
    process.stdin.close()
    assert process.wait(60) == 128 + signal.SIGTERM, run.log.read_text()
    assert "stopped after step" in run.log.read_text()


def test_seconds_left_by_hand():
    # 10 and 20 seconds an epoch; of the third nothing is known, so 40 / 3 as all together.
    paces = [Pace("a", 2, 20.0, 3), Pace("b", 1, 20.0, 2), Pace("c", 0, 0.0, 3), Pace("a", 0, 5.0, 1)]
    assert seconds_left(paces, jobs=1) == pytest.approx(30 + 40 + 40 + 10)
    assert seconds_left(paces, jobs=2) == pytest.approx(60)
    assert seconds_left(paces, jobs=4) == pytest.approx(40)  # as long as the longest
    assert seconds_left([Pace("a", 0, 7.0, 3)], jobs=1) is None
    # Of "a" one seed is complete, and the others are made at once, each epoch of all in 10 seconds.
    paces = [Pace("a", 2, 20.0, 0), Pace("a", 2, 20.0, 4), Pace("a", 2, 20.0, 3), Pace("b", 0, 0.0, 5)]
    assert seconds_left(paces, jobs=1, together=True) == pytest.approx(40 + 50)


def test_clock_counts_the_epochs_of_this_sweep(file, tmp_path):
    runs = plan_sweep([file], tmp_path / "sweep", seeds=[0, 1, 2], overrides=["epochs=4"])

    def record(run, epochs):
        run.workdir.mkdir(parents=True, exist_ok=True)
        (run.workdir / "config.toml").touch()
        lines = [json.dumps({"epoch": epoch}) + "\n" for epoch in range(1, epochs + 1)]
        (run.workdir / "metrics.jsonl").write_text("".join(lines))

    now = [100.0]
    clock = SweepClock(runs, 1, lambda: now[0])
    record(runs[0], 1)
    assert clock.left() is None
    clock.start(runs[0])
    now[0] = 130.0
    record(runs[0], 4)  # three epochs in 30 seconds
    clock.end(runs[0])
    now[0] = 1000.0  # time between runs is none of theirs
    assert clock.left() == pytest.approx(80)
    clock.start(runs[1])
    clock.end(runs[1])  # it failed
    assert clock.left() == pytest.approx(40)
