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

from prepared_sets import examples, images, write_set
from processes import TESTS, Processes, announcements, cluster_arguments, free_address, script, selconv
from runs import assert_same_end, final_arrays, quiet_console
from selconv_jax.errors import CheckpointError, ConfigError
from selconv_jax.train import _run_setup as run_setup
from selconv_jax.train._checkpoints.folders import told
from selconv_jax.train._config import load_config
from selconv_jax.train._distributed import cluster
from selconv_jax.train._distributed.cluster import Cluster, announced, local_gpus
from selconv_jax.train._loop import train_run
from selconv_jax.train._metrics import read_metrics
from trajectory import digest

CONFIG = """\
epochs = 4
batch_size = 400
eval_batch_size = 500
[model]
name = "densenet40"
options = { blocks = [1], growth = 4 }
[allocation]
threshold = 0.4
compile_frozen = false
"""
STEPS = 20


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "tiny.toml"
    file.write_text(CONFIG)
    return file


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
    """30 steps with a round in the middle: one device, eight, and so many processes with one device each."""
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
        assert result["evaluated"][2] == 500, "every image once, also of a ragged last batch"
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


@pytest.mark.slow
def test_saved_by_two_stopped_and_gone_on_with_by_one(config, tmp_path):
    """SIGTERM to one process of a Slurm job: all save the same step and end; one process goes on alone."""
    workdir, unbroken = tmp_path / "run", tmp_path / "unbroken"
    words = ["train", config, "--workdir", workdir]
    with selconv(2, tmp_path / "first", *words, launcher="Slurm") as run:
        run.wait_for_text(0, "epoch 1/4")
        run.started[1].send_signal(signal.SIGTERM)
        assert run.wait(60) == [128 + signal.SIGTERM] * 2, run.outputs()
        step = int(re.search(r"stopped after step (\d+) of 20; resume with `selconv resume", run.text(0))[1])
        assert "epoch" not in run.text(1), "one process speaks for all"
    assert 5 <= step < STEPS
    assert final_arrays(workdir)[0] == step
    with Processes([[sys.executable, "-m", "selconv_jax", "resume", workdir]], tmp_path / "alone") as run:
        assert run.wait(120) == [0], run.outputs()
        assert f"resuming from step {step} of 20" in run.text(0)
    assert [record["epoch"] for record in read_metrics(workdir / "metrics.jsonl")] == [1, 2, 3, 4]
    assert (workdir / "pictures" / "learning_curves.png").exists()
    console, _ = quiet_console()
    assert train_run(load_config(config, ["devices=1"]), unbroken, console) == 0
    for one, other in zip(
        *(read_metrics(folder / "metrics.jsonl") for folder in (workdir, unbroken)), strict=True
    ):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)
        assert one["test_accuracy"] == pytest.approx(other["test_accuracy"], abs=2e-3)
        assert (one["deallocated"], one["reallocated"]) == (other["deallocated"], other["reallocated"])


@pytest.mark.slow
def test_saved_by_four_gone_on_with_by_two_and_one_and_four(config, tmp_path):
    workdir, unbroken = tmp_path / "run", tmp_path / "unbroken"
    with selconv(4, tmp_path / "whole", "train", config, "--workdir", unbroken, "epochs=12") as run:
        assert run.wait(300) == [0] * 4, run.outputs()
    # The word of a signal takes up to a second to spread: some epochs between the stops.
    for count, seen in ((4, 1), (2, 4), (1, 7), (4, None)):
        words = (
            ["resume", workdir] if workdir.exists() else ["train", config, "--workdir", workdir, "epochs=12"]
        )
        with selconv(count, tmp_path / f"output{seen}", *words) as run:
            if seen is None:
                assert run.wait(300) == [0] * count, run.outputs()
            else:
                run.wait_for_text(0, f"epoch {seen}/12")
                run.started[-1].send_signal(signal.SIGTERM)
                assert run.wait(60) == [128 + signal.SIGTERM] * count, run.outputs()
    for one, other in zip(
        *(read_metrics(folder / "metrics.jsonl") for folder in (workdir, unbroken)), strict=True
    ):
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


def test_the_others_end_when_one_is_killed(config, tmp_path):
    """Started by Open MPI."""
    workdir = tmp_path / "run"
    words = ["train", config, "--workdir", workdir, "epochs=400"]
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
def test_killed_at_a_random_moment(config, tmp_path, seed):
    """One of four; the job resumes from the last checkpoint and ends as an unbroken one."""
    random_moment = random.Random(seed)
    workdir = tmp_path / "run"
    with selconv(4, tmp_path / "output", "train", config, "--workdir", workdir) as run:
        run.wait_for_text(0, "run in" if seed == 0 else "epoch 1/4")
        time.sleep(random_moment.uniform(0, 4))
        lose_one(run, random_moment.randrange(4), 4)
    with selconv(4, tmp_path / "again", "resume", workdir) as run:
        assert run.wait(300) == [0] * 4, run.outputs()
    unbroken = tmp_path / "unbroken"
    with selconv(4, tmp_path / "whole", "train", config, "--workdir", unbroken) as run:
        assert run.wait(300) == [0] * 4, run.outputs()
    assert_same_end(workdir, unbroken)


def test_a_job_of_which_one_process_has_come(config, tmp_path):
    """Such as a command in a batch script of Slurm that was not started by srun."""
    command = [sys.executable, "-m", "selconv_jax", "train", config, "--join-timeout", 1]
    with Processes([command], tmp_path, announcements(2, "Slurm")[:1]) as run:
        assert run.wait(30) == [1]
        assert "not all processes of the Slurm job have come within 1 seconds" in run.text(0)
        assert "by srun" in run.text(0)


def test_a_launcher_that_does_not_say_where_the_others_are(config, tmp_path):
    command = [sys.executable, "-m", "selconv_jax", "train", config]
    variables = {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}
    with Processes([command], tmp_path, [variables]) as run:
        assert run.wait(30) == [1]
        assert "selconv: error: the processes of the Slurm job could not be joined" in run.text(0)
        assert "--coordinator, --process and --processes" in run.text(0)


def test_different_configurations_are_refused(config, tmp_path):
    other = tmp_path / "other.toml"
    other.write_text(CONFIG.replace("threshold = 0.4", "threshold = 0.5"))
    workdir = tmp_path / "run"
    commands = [
        [sys.executable, "-m", "selconv_jax", "train", file, "--workdir", workdir, *more]
        for file, more in zip((config, other), cluster_arguments(2), strict=True)
    ]
    with Processes(commands, tmp_path / "output") as run:
        assert run.wait(60) == [1, 1], run.outputs()
        for number in range(2):
            assert (
                "selconv: error: the processes do not have the same configuration: process 0 has "
                "threshold = 0.4, process 1 has threshold = 0.5" in run.text(number)
            ), run.text(number)
    assert not workdir.exists()


def assert_both_refuse(commands, folder, said):
    """Two processes that end by themselves, within a minute, with the same words."""
    commands = [
        [sys.executable, "-m", "selconv_jax", *words, *more]
        for words, more in zip(commands, cluster_arguments(2), strict=True)
    ]
    with Processes(commands, folder) as run:
        assert run.wait(60) == [1, 1], run.outputs()
        for number in range(2):
            assert re.search(f"selconv: error: .*{said}", run.text(number)), run.outputs()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "said"),
    [(None, r"process 1: .*toy.*there/1"), (2, "do not have the same images: .*digest of 100 images")],
    ids=["none", "others"],
)
def test_images_that_one_machine_lacks(tmp_path, seed, said):
    for number, own in enumerate((1, seed)):
        if own is not None:
            splits = {name: examples(images(40, (8, 8, 3), own)) for name in ("train", "test")}
            write_set(tmp_path / "there" / str(number), "toy", splits)
    commands = []
    for number in range(2):
        file = tmp_path / f"{number}.toml"
        file.write_text(f'batch_size = 8\n[data]\nname = "toy"\ndirectory = "{tmp_path}/there/{number}"\n')
        commands.append(["train", file, "--workdir", tmp_path / "run"])
    assert_both_refuse(commands, tmp_path / "output", said)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_checkpoint_of_another_network(config, tmp_path):
    workdir = tmp_path / "run"
    console, _ = quiet_console()
    assert train_run(load_config(config, ["devices=1", "epochs=1"]), workdir, console) == 0
    before = final_arrays(workdir)
    file = workdir / "config.toml"
    file.write_text(
        file.read_text().replace("growth = 4", "growth = 8").replace("devices = 1", "devices = 0")
    )
    assert_both_refuse([["resume", workdir]] * 2, tmp_path / "output", "is a checkpoint of another model")
    np.testing.assert_equal(final_arrays(workdir), before)


def test_a_work_directory_that_is_not_the_first_process_s(tmp_path, monkeypatch):
    """Such as one of the same name on a disk of each machine."""
    monkeypatch.setattr(run_setup, "_SHARING_SECONDS", 0.0)
    with run_setup.claimed(tmp_path):
        pass
    monkeypatch.setattr(run_setup, "lock_mark", lambda workdir: "of a run before")
    with pytest.raises(
        ConfigError, match=r"of process 0 is not the one here. .*choose a --workdir on a file"
    ):
        run_setup.claimed(tmp_path).__enter__()


@pytest.mark.slow
def test_settings_of_jax_that_differ(config, tmp_path):
    words = [sys.executable, "-m", "selconv_jax", "train", config, "--workdir", tmp_path / "run"]
    commands = [[*words, *more] for more in cluster_arguments(2)]
    with Processes(commands, tmp_path / "output", [{}, {"JAX_ENABLE_X64": "1"}]) as run:
        assert run.wait(60) == [1, 1], run.outputs()
        for number in range(2):
            assert "the same software: process 0 has jax_enable_x64 = False" in run.text(number)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_batch_that_the_processes_do_not_divide(config, tmp_path):
    words = ["train", config, "--workdir", tmp_path / "run", "batch_size=401"]
    assert_both_refuse([words] * 2, tmp_path / "output", "batch of 401 images does not divide over 2 devices")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("process", "said"),
    [
        (1, "does not answer .*Start process 0 there"),
        (0, "not all processes have come within 1 seconds. Start all 2 processes of --processes"),
    ],
    ids=["coordinator", "others"],
)
def test_processes_that_do_not_come(config, tmp_path, process, said):
    arguments = ["--coordinator", free_address(), "--process", process, "--processes", 2]
    command = [sys.executable, "-m", "selconv_jax", "train", config, *arguments, "--join-timeout", 1]
    with Processes([command], tmp_path) as run:
        assert run.wait(30) == [1]
        assert re.search(said, run.text(0)), run.text(0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("host:1", None, 2), "belong together; --process is missing"),
        ((None, 0, None), "--coordinator and --processes is missing"),
        (("host", 0, 2), "must be HOST:PORT"),
        (("host:99999", 0, 2), "must be HOST:PORT"),
        (("host:1", 2, 2), "--process is 2; it must be one of 0 to 1"),
        (("host:1", 0, 0), "--processes is 0"),
    ],
)
def test_arguments_that_make_no_sense(arguments, said):
    with pytest.raises(ConfigError, match=said):
        Cluster(*arguments)


@pytest.mark.parametrize(
    ("environment", "devices"),
    [
        ({}, None),
        ({"SLURM_LOCALID": "1"}, None),
        ({"SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, None),
        ({"SLURM_LOCALID": "3", "CUDA_VISIBLE_DEVICES": "3"}, [0]),
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "1", "ROCR_VISIBLE_DEVICES": "1"}, [0]),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "CUDA_VISIBLE_DEVICES": "0,1"}, [0, 1]),
        ({"SLURM_STEP_TASKS_PER_NODE": "1"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_GPUS_ON_NODE": "4"}, [0, 1, 2, 3]),
        ({"SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_GPUS_ON_NODE": "4"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "12(x2)", "CUDA_VISIBLE_DEVICES": "0,1"}, None),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "CUDA_VISIBLE_DEVICES": "0,1"}, [0, 1]),
    ],
)
def test_gpus_of_a_process(environment, devices):
    assert local_gpus(environment) == devices


@pytest.mark.parametrize(
    ("environment", "kind"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, None),
        ({"SLURM_JOB_ID": "1"}, None),
        ({"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, "Slurm"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "t0,t1"}, "TPU pod"),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "t0"}, "TPU pod"),
    ],
)
def test_clusters_that_the_environment_announces(environment, kind):
    assert announced(environment) == kind


def test_digests_differ_with_one_bit():
    state = {"a": jax.numpy.zeros(3), "b": jax.numpy.ones(2)}
    assert digest(state) == digest(jax.tree.map(lambda leaf: leaf + 0, state))
    assert digest(state) != digest({**state, "b": jax.numpy.nextafter(state["b"], 2.0)})
