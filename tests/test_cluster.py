"""Several processes of one run: they agree, stop together, go on, and end when one is lost."""

import contextlib
import errno
import json
import random
import re
import signal
import sys
import time
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest

from processes import TESTS, Processes, script, selconv
from runs import assert_same_end, command, final_arrays, quiet_console
from selconv_jax.errors import CheckpointError, ConfigError
from selconv_jax.train._checkpoints.folders import told
from selconv_jax.train._config import load_config
from selconv_jax.train._distributed import cluster
from selconv_jax.train._loop import train_run
from selconv_jax.train._metrics import read_metrics
from trajectory import TEST_IMAGES, digest


def assert_agree(one, other):
    np.testing.assert_allclose(one["seen"], other["seen"], rtol=1e-5)
    np.testing.assert_allclose(one["evaluated"], other["evaluated"], rtol=1e-5)


@pytest.mark.parametrize(
    ("count", "extent"),
    [
        (2, "part"),
        pytest.param(2, "whole", marks=pytest.mark.slow),
        pytest.param(4, "whole", marks=pytest.mark.slow),
    ],
)
def test_devices_and_processes_agree(tmp_path, count, extent):
    """Two epochs with a round in between: one device, eight, and so many processes with one device each."""
    with Processes(
        [[sys.executable, TESTS / "trajectory.py", tmp_path, count, extent]], tmp_path / "alone"
    ) as run:
        assert run.wait(180) == [0], run.outputs()
    alone = json.loads((tmp_path / "0.json").read_text())
    if extent == "whole":
        assert_agree(alone["eight"], alone["one"])
        assert_agree(alone["per_device"], alone["simulated"])
    assert abs(alone["per_device"]["seen"][-1][0] / alone["one"]["seen"][-1][0] - 1) > 1e-4, (
        "another batch norm"
    )
    with script(count, tmp_path / "output", "trajectory.py", tmp_path, count, extent) as run:
        assert run.wait(300) == [0] * count, run.outputs()
    results = [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(count)]
    for name, result in results[0].items():
        assert len({json.dumps(other[name]) for other in results}) == 1, "bit for bit"
        assert result["evaluated"][2] == TEST_IMAGES[extent], "every image once, also of a ragged last batch"
    assert_agree(results[0]["global"], alone["one"])
    assert_agree(results[0]["per_device"], alone["per_device"])
    if extent == "whole":
        assert results[0]["streamed"] == results[0]["global"], "the same batches, whoever reads them"


def test_what_processes_tell_each_other(tmp_path):
    with script(3, tmp_path, "agreement_process.py") as run:
        assert run.wait(120) == [0, 0, 0], run.outputs()
        lines = [
            [line for line in run.text(number).splitlines() if line.startswith('["')] for number in range(3)
        ]
    said = [{name: (kind, value) for name, kind, value in map(json.loads, each)} for each in lines]
    for number, cases in enumerate(said):
        assert cases["exchange"] == (True, ["", "x", "xx"])
        assert cases["first_decides"] == (True, True)
        assert cases["together"] == (True, number)
        kind, text = cases["refused"]
        assert text == "process 1: there is no folder here."
        assert kind == ("ConfigError" if number == 1 else "SelconvError")
        assert cases["broken"] == ("SelconvError", "process 2: PermissionError: [Errno 13] Permission denied")
        assert cases["same"] == (True, None)
        kind, text = cases["different"]
        assert kind == "ConfigError"
        assert "process 0 has epochs = 3, process 2 has epochs = 4" in text
        assert cases["same state"] == (True, None)
        kind, text = cases["diverged"]
        assert kind == "DivergenceError"
        assert "after epoch 1, processes 1, 2 and process 0 hold different allocations" in text


def records_of_both(workdir, unbroken):
    """The records of two runs, epoch by epoch."""
    return zip(*(read_metrics(folder / "metrics.jsonl") for folder in (workdir, unbroken)), strict=True)


@pytest.mark.slow
def test_saved_by_two_stopped_and_gone_on_with_by_one(cluster_config, tmp_path):
    """SIGTERM to one process of a Slurm job: all save the same step and end; one process goes on alone."""
    workdir, unbroken = tmp_path / "run", tmp_path / "unbroken"
    words = ["train", cluster_config, "--workdir", workdir]
    with selconv(2, tmp_path / "first", *words, launcher="Slurm") as run:
        run.wait_for_text(0, "epoch 1/4  train loss")
        run.started[1].send_signal(signal.SIGTERM)
        assert run.wait(60) == [128 + signal.SIGTERM] * 2, run.outputs()
        step = int(re.search(r"stopped after step (\d+) of 20; resume with `selconv resume", run.text(0))[1])
        assert "epoch" not in run.text(1), "one process speaks for all"
    assert 5 <= step < 20
    assert final_arrays(workdir)[0] == step
    with Processes([command("resume", workdir)], tmp_path / "alone") as run:
        assert run.wait(120) == [0], run.outputs()
        assert f"resuming from step {step} of 20" in run.text(0)
    assert [record["epoch"] for record in read_metrics(workdir / "metrics.jsonl")] == [1, 2, 3, 4]
    assert (workdir / "pictures" / "learning_curves.png").exists()
    console, _ = quiet_console()
    assert train_run(load_config(cluster_config, ["devices=1"]), unbroken, console) == 0
    for one, other in records_of_both(workdir, unbroken):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)
        assert one["test_accuracy"] == pytest.approx(other["test_accuracy"], abs=2e-3)
        assert (one["deallocated"], one["reallocated"]) == (other["deallocated"], other["reallocated"])


@pytest.mark.slow
def test_saved_by_four_gone_on_with_by_two_and_one_and_four(cluster_config, tmp_path):
    workdir, unbroken = tmp_path / "run", tmp_path / "unbroken"
    with selconv(4, tmp_path / "whole", "train", cluster_config, "--workdir", unbroken, "epochs=12") as run:
        assert run.wait(300) == [0] * 4, run.outputs()
    # The word of a signal takes up to a second to spread: some epochs between the stops.
    for count, seen in ((4, 1), (2, 4), (1, 7), (4, None)):
        words = ["train", cluster_config, "--workdir", workdir, "epochs=12"]
        words = ["resume", workdir] if workdir.exists() else words
        with selconv(count, tmp_path / f"output{seen}", *words) as run:
            if seen is None:
                assert run.wait(300) == [0] * count, run.outputs()
            else:
                run.wait_for_text(0, f"epoch {seen}/12  train loss")
                run.started[-1].send_signal(signal.SIGTERM)
                assert run.wait(60) == [128 + signal.SIGTERM] * count, run.outputs()
    for one, other in records_of_both(workdir, unbroken):
        # Sums over other numbers of devices round otherwise, and training magnifies it.
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-3)
    assert final_arrays(workdir)[0] == final_arrays(unbroken)[0] == 60


def lose_one(run, number, count):
    """Kills a process; the others must end by themselves, soon, and say which was lost."""
    run.started[number].kill()
    codes = run.wait(60)
    assert codes[number] == -signal.SIGKILL
    others = [other for other in range(count) if other != number]
    assert all(codes[other] != 0 for other in others), run.outputs()
    lost = "(Failed to send RPC to coordination service|leader)"
    if number != 0:
        lost = rf"(unhealthy|stopped sending heartbeats)[^\n]*\n{number}\n|lost: process {number}\n"
    named = [bool(re.search(lost, run.text(other))) for other in others]
    # Where the library that carries messages on CPU finds its peers in disorder, it ends a process by itself.
    broken = ["gloo::EnforceNotMet" in run.text(other) for other in others]
    assert all(one or other for one, other in zip(named, broken, strict=True)), run.outputs()
    assert any(named), run.outputs()


def test_the_others_end_when_one_is_killed(cluster_config, tmp_path):
    """Started by Open MPI."""
    workdir = tmp_path / "run"
    words = ["train", cluster_config, "--workdir", workdir, "epochs=400"]
    with selconv(2, tmp_path / "output", *words, launcher="Open MPI") as run:
        run.wait_for_text(0, "epoch 1/400")
        run.wait_for_file(workdir / "checkpoints" / "5")
        lose_one(run, 1, 2)
        assert "can no longer reach another one" in run.text(0)
        assert "selconv resume" in run.text(0)
        assert "selconv: error: lost: process 1\n" in run.text(0)
        assert ".cc:" not in run.text(0).split("selconv: error: lost")[1]
    assert final_arrays(workdir)[0] >= 5


@pytest.mark.parametrize("wrapped", [False, True])
def test_loss_that_is_noticed_while_saving_is_one(monkeypatch, capsys, wrapped):
    """The store says it in an error of ours, as the process which is left cannot write its share alone."""
    lost = jax.errors.JaxRuntimeError("INTERNAL: Barrier failed: UNAVAILABLE: Task 1 heartbeat timeout.")
    monkeypatch.setattr(cluster, "_shorten_last_words", lambda: None)
    monkeypatch.setattr(cluster.time, "sleep", lambda seconds: None)
    ends = mock.Mock(side_effect=SystemExit)
    monkeypatch.setattr(cluster.os, "_exit", ends)
    saving = told(15, Path("run/checkpoints")) if wrapped else contextlib.nullcontext()
    with pytest.raises(SystemExit), cluster._ended_by_loss(), saving:
        raise lost
    ends.assert_called_once_with(1)
    (line,) = capsys.readouterr().err.splitlines()
    assert "can no longer reach another one" in line
    assert ("Could not write the checkpoint of step 15" in line) == wrapped


def test_error_of_this_process_alone_is_no_loss():
    saving = told(15, Path("run/checkpoints"))
    with pytest.raises(CheckpointError, match="the disk is full"), cluster._ended_by_loss(), saving:
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(ConfigError, match="one line"), cluster._ended_by_loss():
        raise ConfigError("one line")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_killed_at_a_random_moment(cluster_config, tmp_path, seed):
    """One of four; the job resumes from the last checkpoint and ends as an unbroken one."""
    random_moment = random.Random(seed)
    workdir = tmp_path / "run"
    with selconv(4, tmp_path / "output", "train", cluster_config, "--workdir", workdir) as run:
        run.wait_for_text(0, "run in" if seed == 0 else "epoch 1/4")
        time.sleep(random_moment.uniform(0, 4))
        lose_one(run, random_moment.randrange(4), 4)
    with selconv(4, tmp_path / "again", "resume", workdir) as run:
        assert run.wait(300) == [0] * 4, run.outputs()
    unbroken = tmp_path / "unbroken"
    with selconv(4, tmp_path / "whole", "train", cluster_config, "--workdir", unbroken) as run:
        assert run.wait(300) == [0] * 4, run.outputs()
    assert_same_end(workdir, unbroken)


def test_digests_differ_with_one_bit():
    state = {"a": jax.numpy.zeros(3), "b": jax.numpy.ones(2)}
    assert digest(state) == digest(jax.tree.map(lambda leaf: leaf + 0, state))
    assert digest(state) != digest({**state, "b": jax.numpy.nextafter(state["b"], 2.0)})
