"""Runs that are stopped and resumed: they end as an unbroken one, bit for bit."""

import copy
import dataclasses
import re
import signal

import jax
import pytest

from runs import (
    StopAfter,
    assert_same_end,
    compiled_once,
    final_arrays,
    quiet_console,
    tiny_config,
    whole_config,
)
from selconv_jax import CheckpointError, ConfigError
from selconv_jax.train import _loop as loop
from selconv_jax.train import _run_setup as run_setup
from selconv_jax.train._evaluation import evaluate_run
from selconv_jax.train._loop import resume_run, train_run
from selconv_jax.train._metrics import read_metrics
from selconv_jax.train._trainer import Trainer
from selconv_jax.train._workdir import create_workdir

pytestmark = pytest.mark.optimized


@pytest.fixture(scope="module", autouse=True)
def shared_programs():
    with compiled_once():
        yield


def train_until_stopped(config, workdir, questions):
    """Begins a run that is asked to stop by its answer to so many questions; returns what it printed."""
    console, text = quiet_console()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "stop_request", lambda: StopAfter(questions))
        assert train_run(config, workdir, console) == 128 + signal.SIGTERM
    return text.getvalue()


def assert_goes_on_as(workdir, whole):
    """A stopped run is resumed and then equals an unbroken one; returns what it printed."""
    console, text = quiet_console()
    assert resume_run(workdir, console) == 0
    assert_same_end(workdir, whole)
    assert_same_metrics(workdir, whole)
    return text.getvalue()


def assert_same_metrics(workdir, other):
    one, two = (read_metrics(path / "metrics.jsonl") for path in (workdir, other))
    assert [strip_speed(record) for record in one] == [strip_speed(record) for record in two]


def strip_speed(record):
    return {key: value for key, value in record.items() if key != "images_per_second"}


@pytest.mark.parametrize(
    "questions", [12, *(pytest.param(number, marks=pytest.mark.slow) for number in (0, 1, 3, 5, 6, 9, 20))]
)
def test_stopped_and_resumed_run_equals_an_unbroken_one(whole_run, tmp_path, questions):
    """Stops in the middle of an epoch, at its end, during evaluation."""
    workdir = tmp_path / "broken"
    text = train_until_stopped(whole_config(), workdir, questions)
    step = int(re.search(r"stopped after step (\d+) of 16; resume with `selconv resume", text)[1])
    assert step < 16
    if step > 0:
        assert final_arrays(workdir)[0] == step
    assert_goes_on_as(workdir, whole_run[0])


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
def test_resumed_after_the_last_round_within_an_epoch(rounds_within_epochs, tmp_path, questions):
    """From there on the steps are compiled for the frozen allocation, whoever makes them."""
    config, whole = rounds_within_epochs
    train_until_stopped(config, tmp_path / "broken", questions)
    assert 4 < final_arrays(tmp_path / "broken")[0] < 8
    assert_goes_on_as(tmp_path / "broken", whole)


@pytest.mark.slow
def test_resuming_again_and_again(whole_run, tmp_path, monkeypatch):
    workdir = tmp_path / "broken"
    train_until_stopped(whole_config(), workdir, 2)
    monkeypatch.setattr(loop, "stop_request", lambda: StopAfter(6))
    code, attempts = None, 0
    while code != 0 and attempts < 40:
        code, attempts = resume_run(workdir, quiet_console()[0]), attempts + 1
    assert code == 0
    assert attempts > 2
    assert_same_end(workdir, whole_run[0])
    assert_same_metrics(workdir, whole_run[0])


def test_resuming_before_the_first_checkpoint_starts_anew(whole_run, tmp_path, monkeypatch):
    workdir = tmp_path / "early"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "initial_state", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train_run(whole_config(), workdir, quiet_console()[0])
    assert "there is no checkpoint yet" in assert_goes_on_as(workdir, whole_run[0])


def test_a_directory_of_any_name(whole_run, tmp_path):
    """As sweeps name folders; Orbax takes the name for a pattern."""
    workdir = tmp_path / "lr=[0.1] a\\b*"
    train_until_stopped(whole_config(), workdir, 14)
    assert_goes_on_as(workdir, whole_run[0])
    assert evaluate_run(workdir) == evaluate_run(whole_run[0])


def test_resuming_a_complete_run_changes_nothing(whole_run):
    workdir, _ = whole_run
    before = read_metrics(workdir / "metrics.jsonl")
    assert resume_run(workdir, quiet_console()[0]) == 0
    assert read_metrics(workdir / "metrics.jsonl") == before


def test_damaged_checkpoint_falls_back_and_says_so(whole_run, tmp_path):
    workdir = tmp_path / "damaged"
    train_until_stopped(whole_config(), workdir, 14)
    newest = max((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    victim = max((file for file in newest.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-7])
    assert f"skipped: {newest} is damaged" in assert_goes_on_as(workdir, whole_run[0])


def test_a_checkpoint_beyond_the_end_of_the_run_is_refused(whole_run, monkeypatch):
    workdir, _ = whole_run
    before = read_metrics(workdir / "metrics.jsonl")
    prepare = run_setup.prepare

    def prepare_shorter(config):
        trainer, data = prepare(config)
        shorter = copy.copy(trainer)
        shorter.steps = 3
        return shorter, data

    monkeypatch.setattr(run_setup, "prepare", prepare_shorter)
    with pytest.raises(CheckpointError, match=r"is of step \d+, but the run has 3 steps"):
        resume_run(workdir, quiet_console()[0])
    assert read_metrics(workdir / "metrics.jsonl") == before


class Passed(Exception):
    """All checks are passed."""


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """Begins runs, and resumes them until all checks of the surroundings are passed."""

    def prepared(config):
        raise Passed

    def begin(**changes):
        create_workdir(tmp_path, dataclasses.replace(whole_config(), **changes), {})
        return lambda: resume_run(tmp_path, quiet_console()[0])

    monkeypatch.setattr(run_setup, "prepare", prepared)
    return begin


@pytest.mark.parametrize("batch_norm", ["per_device", "global"])
def test_statistics_of_each_device_need_as_many_devices(begun, monkeypatch, batch_norm):
    """A run on all devices is resumed where there are fewer."""
    resume = begun(devices=0, batch_size=40, batch_norm=batch_norm)
    with pytest.raises(Passed):
        resume()
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    with pytest.raises(Passed if batch_norm == "global" else ConfigError) as caught:
        resume()
    assert ("began on 8 devices, and here are 4" in str(caught.value)) == (batch_norm == "per_device")


def test_other_random_numbers_are_refused(begun):
    resume = begun()
    with pytest.raises(Passed):
        resume()
    with jax.threefry_partitionable(False), pytest.raises(ConfigError) as caught:
        resume()
    assert "began with jax_threefry_partitionable = True, and here it is False" in str(caught.value)
    assert "Set JAX_THREEFRY_PARTITIONABLE to what it was" in str(caught.value)
