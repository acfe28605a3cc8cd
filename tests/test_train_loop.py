"""The training loop: what a run leaves, refuses and survives."""

import dataclasses
import errno
import fcntl
import json
import re
import shutil

import jax
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from runs import compiled_once, final_arrays, quiet_console, tiny_config, whole_config
from selconv_jax import CheckpointError, ConfigError, DataError
from selconv_jax.data._loading import load
from selconv_jax.train import _trainer as trainer
from selconv_jax.train._evaluation import evaluate_run
from selconv_jax.train._loop import NonFiniteLossError, resume_run, train_run
from selconv_jax.train._metrics import read_metrics
from selconv_jax.train._run_setup import find_checkpoint
from selconv_jax.train._trainer import Trainer
from selconv_jax.train._workdir import create_workdir, default_workdir, lock

pytestmark = pytest.mark.optimized


@pytest.fixture(scope="module", autouse=True)
def shared_programs():
    with compiled_once():
        yield


def test_what_a_run_leaves(whole_run):
    workdir, text = whole_run
    assert {path.name for path in workdir.iterdir()} >= {
        "checkpoints",
        "config.toml",
        "environment.json",
        "metrics.jsonl",
        "tensorboard",
    }
    records = read_metrics(workdir / "metrics.jsonl")
    assert [record["epoch"] for record in records] == [1, 2, 3, 4]
    for record in records:
        assert record.keys() >= {
            "train_loss",
            "train_accuracy",
            "test_loss",
            "test_accuracy",
            "test_top5",
            "learning_rate",
            "images_per_second",
            "deallocated",
            "reallocated",
        }
        assert record["test_accuracy"] <= record["test_top5"] <= 1
    assert records[-1]["train_loss"] < records[0]["train_loss"] < 3
    # Re-allocation after the first half of the epochs only.
    assert all(record["deallocated"] > 0 and record["reallocated"] > 0 for record in records[:2])
    assert all(record["deallocated"] == record["reallocated"] == 0 for record in records[2:])
    assert records[-1]["copies"] == records[1]["copies"] > 0
    assert records[-1]["learning_rate"] < records[0]["learning_rate"] < 0.1
    about = json.loads((workdir / "environment.json").read_text())
    assert about["seed"] == 0
    assert about["versions"]["jax"] == jax.__version__
    assert "epoch 4/4" in text
    assert "compiling the training step for copies in up to" in text
    assert text.count("compiling the training step for the frozen allocation (") == 1
    assert final_arrays(workdir)[0] == 16


def test_tensorboard_holds_the_same_numbers(whole_run):
    workdir, _ = whole_run
    (file,) = (workdir / "tensorboard").iterdir()
    found = {}
    raw = file.read_bytes()
    while raw:
        length = int.from_bytes(raw[:8], "little")
        event = event_pb2.Event.FromString(raw[12 : 12 + length])
        raw = raw[16 + length :]
        for value in event.summary.value:
            found[value.tag, event.step] = value.simple_value
    for record in read_metrics(workdir / "metrics.jsonl"):
        for key, value in record.items():
            if key != "epoch":
                assert found[key, record["epoch"]] == pytest.approx(value, rel=1e-6)


def test_evaluation_repeats_the_recorded_numbers(whole_run):
    workdir, _ = whole_run
    records = read_metrics(workdir / "metrics.jsonl")
    step, metrics = evaluate_run(workdir)
    assert step == 16
    assert metrics == {key: records[-1][key] for key in ("test_loss", "test_accuracy", "test_top5")}
    assert find_checkpoint(workdir, "last").step == 16
    assert find_checkpoint(workdir, "best").step == 16, "nothing is chosen by the test images"
    with pytest.raises(ConfigError, match="'newest' is none of last, best"):
        find_checkpoint(workdir, "newest")


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory):
    """The records of a run of two epochs."""
    workdir = tmp_path_factory.mktemp("runs") / "two"
    assert train_run(tiny_config(epochs=2), workdir, quiet_console()[0]) == 0
    return read_metrics(workdir / "metrics.jsonl")


@pytest.mark.slow
def test_steps_in_one_dispatch_agree_with_single_ones(two_epochs, tmp_path):
    """A scan is another program: equal up to rounding, with the same re-allocation."""
    workdir = tmp_path / "scanned"
    console, _ = quiet_console()
    assert train_run(tiny_config(steps_per_dispatch=3, epochs=2), workdir, console) == 0
    records = read_metrics(workdir / "metrics.jsonl")
    assert records[0]["train_loss"] == pytest.approx(two_epochs[0]["train_loss"], rel=1e-4)
    assert records[0]["deallocated"] == two_epochs[0]["deallocated"]


@pytest.mark.slow
def test_devices_agree_with_one(two_epochs, tmp_path):
    """Batch norm over the global batch: the first epoch agrees up to rounding."""
    workdir = tmp_path / "sharded"
    console, _ = quiet_console()
    assert train_run(tiny_config(devices=2, epochs=2, eval_batch_size=33), workdir, console) == 0
    record, _ = read_metrics(workdir / "metrics.jsonl")
    expected, _ = two_epochs
    assert record["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-4)
    assert record["deallocated"] == expected["deallocated"]


def test_non_finite_loss_stops_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    workdir = tmp_path / "diverged"
    console, _ = quiet_console()
    original = trainer.train_step

    def broken(state, *arguments, **options):
        state = original(state, *arguments, **options)
        failed = jax.numpy.where(state.step == 7, 6, state.failed_step)
        return dataclasses.replace(state, failed_step=failed)

    monkeypatch.setattr(trainer, "train_step", broken)
    config = tiny_config(description="of its own, as the step is another")
    with pytest.raises(NonFiniteLossError, match=r"loss of step 7 \(epoch 2\) is not finite.*step 4 is kept"):
        train_run(config, workdir, console)
    assert final_arrays(workdir)[0] == 4
    assert len(read_metrics(workdir / "metrics.jsonl")) == 1


def test_a_loss_that_really_diverges(tmp_path):
    console, _ = quiet_console()
    config = tiny_config(optimizer={"learning_rate": 1e30})
    with pytest.raises(NonFiniteLossError, match="is not finite; there is no checkpoint yet"):
        train_run(config, tmp_path / "run", console)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["plain", "gate_only"])
def test_other_variants_train(tmp_path, variant):
    workdir = tmp_path / variant
    console, _ = quiet_console()
    assert train_run(tiny_config(epochs=2, model={"variant": variant}), workdir, console) == 0
    first, second = read_metrics(workdir / "metrics.jsonl")
    assert second["train_loss"] < first["train_loss"]
    assert first["reallocated"] == first["copies"] == 0
    assert (first["deallocated"] > 0) == (variant == "gate_only")


@pytest.mark.slow
def test_bfloat16_and_reset_momentum_train(tmp_path):
    workdir = tmp_path / "run"
    console, _ = quiet_console()
    config = tiny_config(epochs=2, model={"dtype": "bfloat16"}, allocation={"reset_momentum": True})
    assert train_run(config, workdir, console) == 0
    first, second = read_metrics(workdir / "metrics.jsonl")
    assert second["train_loss"] < first["train_loss"]
    assert first["reallocated"] > 0
    _, arrays = final_arrays(workdir)
    assert arrays["params/stem/kernel"].dtype == np.float32


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"batch_size": 201},
            ConfigError,
            "batch_size is 201; .* has 200 training images",
        ),
        ({"model": {"options": {"capacity": 1.0}}}, ConfigError, "model.options.capacity cannot be set"),
        ({"model": {"options": {"blocks": "33"}}}, ConfigError, "blocks is '33'; it must be a list"),
        ({"devices": 3}, ConfigError, "a batch of 50 images does not divide over 3 devices"),
        ({"devices": 99}, ConfigError, "devices is 99; there are 8"),
        ({"model": {"name": "densnet"}}, ConfigError, "there is no model 'densnet'"),
        ({"model": {"options": {"grow": 3}}}, ConfigError, "no option 'grow'. Did you mean 'growth'"),
        ({"data": {"name": "fashion_mnst"}}, DataError, "fashion_mnst"),
        (
            {"data": {"name": "cifar10", "directory": "/nonexistent"}},
            DataError,
            "selconv data prepare cifar10",
        ),
    ],
)
def test_refused_before_anything_is_written(tmp_path, changes, error, message):
    workdir = tmp_path / "run"
    console, _ = quiet_console()
    with pytest.raises(error, match=message):
        train_run(tiny_config(**changes), workdir, console)
    assert not workdir.exists()


def test_a_directory_with_a_run_is_never_overwritten(whole_run, tmp_path):
    workdir, _ = whole_run
    console, _ = quiet_console()
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"already holds a run. Go on with it by `selconv resume"):
        train_run(whole_config(), workdir, console)
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()} == before
    spaced = shutil.copytree(workdir, tmp_path / "the run")
    with pytest.raises(ConfigError, match=rf"by `selconv resume '{re.escape(str(spaced))}'`"):
        train_run(whole_config(), spaced, console)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"is not empty \(it holds 'notes.txt'\)"):
        train_run(tiny_config(), tmp_path, console)
    with pytest.raises(ConfigError, match="does not hold a run"):
        resume_run(tmp_path, console)


def test_what_a_process_left_that_never_began_is_in_nobodys_way(tmp_path):
    (tmp_path / "environment.json").write_text("{")
    (tmp_path / ".config.toml.new").write_text("epo")
    create_workdir(tmp_path, tiny_config(), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.toml", "environment.json"]


def test_two_processes_do_not_share_a_run(whole_run):
    workdir, _ = whole_run
    console, _ = quiet_console()
    with lock(workdir), pytest.raises(ConfigError, match="another process is working on"):
        resume_run(workdir, console)


def test_a_file_system_without_locks(whole_run, monkeypatch):
    def refuse(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(ConfigError, match=r"cannot lock files .No locks available."):
        resume_run(whole_run[0], quiet_console()[0])


def test_without_a_console_progress_goes_to_standard_output(whole_run, capsys):
    assert resume_run(whole_run[0]) == 0
    assert "resuming from step" in capsys.readouterr().out


def test_disk_full_is_an_error_and_keeps_what_is_there(tmp_path, monkeypatch):
    workdir = tmp_path / "full"
    console, _ = quiet_console()
    from selconv_jax.train._checkpoints import checkpoint

    original, saves = checkpoint.write_arrays, []

    def write_arrays(folder, arrays):
        saves.append(folder)
        if len(saves) == 2:
            raise OSError(28, "No space left on device")
        original(folder, arrays)

    monkeypatch.setattr(checkpoint, "write_arrays", write_arrays)
    with pytest.raises(CheckpointError, match="the disk is full"):
        train_run(whole_config(), workdir, console)
    monkeypatch.undo()
    assert final_arrays(workdir)[0] == 4


def test_default_workdir_is_free(tmp_path):
    assert default_workdir("experiments/a.toml", tmp_path) == tmp_path / "a"
    (tmp_path / "a").mkdir()
    (tmp_path / "a-2").mkdir()
    assert default_workdir("a.toml", tmp_path) == tmp_path / "a-3"


def test_slots_grow_with_the_copies():
    tested = Trainer(tiny_config(), load("fashion_mnist_sample"))
    state = tested.initial_state()
    assert tested.program(state, 0).model.capacity == 0.0
    layers = state.selectivity["block1_layer1"]
    assert layers["conv1"]["source"].shape == (8,)
    for copies, bucket in ((1, 0.125), (2, 0.25), (3, 0.5), (4, 0.5), (5, 1.0), (8, 1.0)):
        source = np.where(np.arange(8) < copies, 0, -1)
        selectivity = {"block1_layer1": {**layers, "conv1": {**layers["conv1"], "source": source}}}
        program = tested.program(dataclasses.replace(state, selectivity=selectivity), 0)
        assert program.model.capacity == bucket
