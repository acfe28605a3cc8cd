"""The training loop: what a run leaves, goes on from, refuses and survives."""

import dataclasses
import errno
import fcntl
import json
import re
import signal

import jax
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from runs import (
    StopAfter,
    assert_same_end,
    compiled_once,
    final_arrays,
    quiet_console,
    tiny_config,
    whole_config,
)
from selconv_jax import CheckpointError, ConfigError, DataError
from selconv_jax.data._loading import load
from selconv_jax.train import _loop as loop
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


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An unbroken tiny run."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    console, text = quiet_console()
    assert train_run(whole_config(), workdir, console) == 0
    return workdir, text.getvalue()


def test_what_a_run_leaves(finished):
    workdir, text = finished
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


def test_tensorboard_holds_the_same_numbers(finished):
    workdir, _ = finished
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


def test_evaluation_repeats_the_recorded_numbers(finished):
    workdir, _ = finished
    records = read_metrics(workdir / "metrics.jsonl")
    step, metrics = evaluate_run(workdir)
    assert step == 16
    assert metrics == {key: records[-1][key] for key in ("test_loss", "test_accuracy", "test_top5")}
    assert find_checkpoint(workdir, "last").step == 16
    assert find_checkpoint(workdir, "best").step == 16, "nothing is chosen by the test images"
    with pytest.raises(ConfigError, match="'newest' is none of last, best"):
        find_checkpoint(workdir, "newest")


@pytest.mark.parametrize(
    "questions", [12, *(pytest.param(number, marks=pytest.mark.slow) for number in (0, 1, 3, 5, 6, 9, 20))]
)
def test_stopped_and_resumed_run_equals_an_unbroken_one(finished, tmp_path, monkeypatch, questions):
    """Stops in the middle of an epoch, at its end, during evaluation."""
    workdir = tmp_path / "broken"
    console, text = quiet_console()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "stop_request", lambda: StopAfter(questions))
        assert train_run(whole_config(), workdir, console) == 128 + signal.SIGTERM
    step = int(re.search(r"stopped after step (\d+) of 16; resume with `selconv resume", text.getvalue())[1])
    assert step < 16
    if step > 0:
        assert final_arrays(workdir)[0] == step
    assert resume_run(workdir, console) == 0
    assert_same_end(workdir, finished[0])
    assert_same_metrics(workdir, finished[0])


@pytest.fixture(scope="module")
def rounds_within_epochs(tmp_path_factory):
    """A run whose allocation is frozen within an epoch: its configuration and directory."""
    config = tiny_config(epochs=3, allocation={"every_steps": 5, "until": 0.5, "compile_frozen": True})
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    console, text = quiet_console()
    assert train_run(config, workdir, console) == 0
    assert "for the frozen allocation" in text.getvalue()
    return config, workdir


@pytest.mark.slow
@pytest.mark.parametrize("questions", [9, 10, 11])
def test_resumed_after_the_last_round_within_an_epoch(rounds_within_epochs, tmp_path, monkeypatch, questions):
    """From there on the steps are compiled for the frozen allocation, whoever makes them."""
    config, whole = rounds_within_epochs
    console, _ = quiet_console()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "stop_request", lambda: StopAfter(questions))
        assert train_run(config, tmp_path / "broken", console) == 128 + signal.SIGTERM
    assert 4 < final_arrays(tmp_path / "broken")[0] < 8
    assert resume_run(tmp_path / "broken", console) == 0
    assert_same_end(tmp_path / "broken", whole)
    assert_same_metrics(tmp_path / "broken", whole)


@pytest.mark.slow
def test_resuming_again_and_again(finished, tmp_path, monkeypatch):
    workdir = tmp_path / "broken"
    console, _ = quiet_console()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "stop_request", lambda: StopAfter(2))
        code = train_run(whole_config(), workdir, console)
        attempts = 0
        while code != 0 and attempts < 40:
            patch.setattr(loop, "stop_request", lambda: StopAfter(6))
            code, attempts = resume_run(workdir, console), attempts + 1
    assert code == 0
    assert attempts > 2
    assert_same_end(workdir, finished[0])
    assert_same_metrics(workdir, finished[0])


def test_resuming_before_the_first_checkpoint_starts_anew(finished, tmp_path, monkeypatch):
    workdir = tmp_path / "early"
    console, text = quiet_console()
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "initial_state", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train_run(whole_config(), workdir, console)
    assert resume_run(workdir, console) == 0
    assert "there is no checkpoint yet" in text.getvalue()
    assert_same_end(workdir, finished[0])


def test_a_directory_of_any_name(finished, tmp_path, monkeypatch):
    """As sweeps name folders; Orbax takes the name for a pattern."""
    workdir = tmp_path / "lr=[0.1] a\\b*"
    console, _ = quiet_console()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "stop_request", lambda: StopAfter(14))
        assert train_run(whole_config(), workdir, console) != 0
    assert resume_run(workdir, console) == 0
    assert_same_end(workdir, finished[0])
    assert evaluate_run(workdir) == evaluate_run(finished[0])


def test_resuming_a_complete_run_changes_nothing(finished):
    workdir, _ = finished
    before = read_metrics(workdir / "metrics.jsonl")
    console, _ = quiet_console()
    assert resume_run(workdir, console) == 0
    assert read_metrics(workdir / "metrics.jsonl") == before


def test_damaged_checkpoint_falls_back_and_says_so(finished, tmp_path, monkeypatch):
    workdir = tmp_path / "damaged"
    console, text = quiet_console()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "stop_request", lambda: StopAfter(14))
        assert train_run(whole_config(), workdir, console) != 0
    newest = max((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    victim = max((file for file in newest.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-7])
    assert resume_run(workdir, console) == 0
    assert f"skipped: {newest} is damaged" in text.getvalue()
    assert_same_end(workdir, finished[0])
    assert_same_metrics(workdir, finished[0])


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


def test_a_directory_with_a_run_is_never_overwritten(finished, tmp_path):
    workdir, _ = finished
    console, _ = quiet_console()
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"already holds a run. Go on with it by `selconv resume"):
        train_run(whole_config(), workdir, console)
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()} == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"is not empty \(it holds 'notes.txt'\)"):
        train_run(tiny_config(), tmp_path, console)
    with pytest.raises(ConfigError, match="does not hold a run"):
        resume_run(tmp_path, console)


def test_what_a_process_left_that_never_began_is_in_nobodys_way(tmp_path):
    (tmp_path / "environment.json").write_text("{")
    (tmp_path / ".config.toml.new").write_text("epo")
    create_workdir(tmp_path, tiny_config())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.toml", "environment.json"]


def test_two_processes_do_not_share_a_run(finished):
    workdir, _ = finished
    console, _ = quiet_console()
    with lock(workdir), pytest.raises(ConfigError, match="another process is working on"):
        resume_run(workdir, console)


def test_a_file_system_without_locks(finished, monkeypatch):
    def refuse(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(ConfigError, match=r"cannot lock files .No locks available."):
        resume_run(finished[0], quiet_console()[0])


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


def strip_speed(record):
    return {key: value for key, value in record.items() if key != "images_per_second"}


def assert_same_metrics(workdir, other):
    one, two = (read_metrics(path / "metrics.jsonl") for path in (workdir, other))
    assert [strip_speed(record) for record in one] == [strip_speed(record) for record in two]
