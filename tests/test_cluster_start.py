"""Several processes begin a run: how each finds the others, and what they refuse together."""

import re

import numpy as np
import pytest

from prepared_sets import examples, images, write_set
from processes import Processes, announcements, cluster_arguments, free_address
from runs import command, final_arrays, quiet_console
from selconv_jax.errors import ConfigError
from selconv_jax.train import _run_setup as run_setup
from selconv_jax.train._config import load_config
from selconv_jax.train._distributed.cluster import Cluster, announced, local_gpus
from selconv_jax.train._loop import train_run


def test_a_job_of_which_one_process_has_come(cluster_config, tmp_path):
    """Such as a command in a batch script of Slurm that was not started by srun."""
    words = ["train", cluster_config, "--join-timeout", 1]
    with Processes([command(*words)], tmp_path, announcements(2, "Slurm")[:1]) as run:
        assert run.wait(30) == [1]
        assert "not all processes of the Slurm job have come within 1 seconds" in run.text(0)
        assert "by srun" in run.text(0)


def test_a_launcher_that_does_not_say_where_the_others_are(cluster_config, tmp_path):
    variables = {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}
    with Processes([command("train", cluster_config)], tmp_path, [variables]) as run:
        assert run.wait(30) == [1]
        assert "selconv: error: the processes of the Slurm job could not be joined" in run.text(0)
        assert "--coordinator, --process and --processes" in run.text(0)


def assert_both_refuse(commands, folder, said, variables=None):
    """Two processes that end by themselves, within a minute, with the same words."""
    commands = [command(*words, *more) for words, more in zip(commands, cluster_arguments(2), strict=True)]
    with Processes(commands, folder, variables) as run:
        assert run.wait(60) == [1, 1], run.outputs()
        for number in range(2):
            assert re.search(f"selconv: error: .*{said}", run.text(number)), run.outputs()


def test_different_configurations_are_refused(cluster_config, tmp_path):
    other = tmp_path / "other.toml"
    other.write_text(cluster_config.read_text().replace("threshold = 0.4", "threshold = 0.5"))
    workdir = tmp_path / "run"
    commands = [["train", file, "--workdir", workdir] for file in (cluster_config, other)]
    said = (
        "the processes do not have the same configuration: process 0 has "
        r"threshold = 0\.4, process 1 has threshold = 0\.5"
    )
    assert_both_refuse(commands, tmp_path / "output", said)
    assert not workdir.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "said"),
    [(None, r"process 1: .*toy.*there/1"), (2, "do not have the same images: .*of 100 images of each split")],
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
def test_a_checkpoint_of_another_network(cluster_config, tmp_path):
    workdir = tmp_path / "run"
    console, _ = quiet_console()
    assert train_run(load_config(cluster_config, ["devices=1", "epochs=1"]), workdir, console) == 0
    before = final_arrays(workdir)
    file = workdir / "config.toml"
    file.write_text(
        file.read_text().replace("growth = 4", "growth = 8").replace("devices = 1", "devices = 0")
    )
    assert_both_refuse([["resume", workdir]] * 2, tmp_path / "output", "configuration has been changed since")
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
def test_settings_of_jax_that_differ(cluster_config, tmp_path):
    words = ["train", cluster_config, "--workdir", tmp_path / "run"]
    said = "the same software: process 0 has jax_enable_x64 = False"
    assert_both_refuse([words] * 2, tmp_path / "output", said, [{}, {"JAX_ENABLE_X64": "1"}])
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_batch_that_the_processes_do_not_divide(cluster_config, tmp_path):
    words = ["train", cluster_config, "--workdir", tmp_path / "run", "batch_size=401"]
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
def test_processes_that_do_not_come(cluster_config, tmp_path, process, said):
    arguments = ["--coordinator", free_address(), "--process", process, "--processes", 2]
    words = ["train", cluster_config, *arguments, "--join-timeout", 1]
    with Processes([command(*words)], tmp_path) as run:
        assert run.wait(30) == [1]
        assert re.search(said, run.text(0)), run.text(0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("host:1", None, 2), "belong together; --process is missing"),
        ((None, 0, None), "--coordinator and --processes are missing"),
        (("host", 0, 2), "must be HOST:PORT"),
        (("host:99999", 0, 2), "must be HOST:PORT"),
        (("host:1", 2, 2), "--process is 2; it must be one of 0 to 1"),
        (("host:1", 0, 0), "--processes is 0"),
        (("host:1", 0, 2, 0.0), "--join-timeout is 0.0; it must be a number of seconds above 0"),
        (("host:1", 0, 2, float("nan")), "--join-timeout is nan"),
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
