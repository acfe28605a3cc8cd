"""Runs with validation images: what is trained on, recorded, kept as the best, and refused at the start."""

import shutil
import signal

import numpy as np
import pytest

from runs import (
    ALL_IMAGES,
    StopAfter,
    assert_same_end,
    compiled_once,
    quiet_console,
    tiny_config,
)
from selconv_jax import ConfigError, SelconvError
from selconv_jax._cli.main import main
from selconv_jax.train import _loop as loop
from selconv_jax.train import _run_setup as run_setup
from selconv_jax.train._checkpoints.checkpoint import CheckpointStore
from selconv_jax.train._evaluation import compact_run, evaluate_run
from selconv_jax.train._loop import resume_run, train_run
from selconv_jax.train._metrics import read_metrics
from selconv_jax.train._run_setup import find_checkpoint
from selconv_jax.train._sweeps.configurations import check_sweep, plan_sweep

SPLITS = {"train_split": "train[:120]", "validation_split": "train[120:200]", "test_split": "test[:70]"}


def config(**changes):
    """Two steps an epoch of 50 images; keeps one checkpoint beside the best."""
    return tiny_config(keep_checkpoints=1, **changes)


@pytest.fixture(scope="module", autouse=True)
def shared_programs():
    with compiled_once():
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    console, text = quiet_console()
    assert train_run(config(data={"validation": 90}), workdir, console) == 0
    return workdir, text.getvalue(), read_metrics(workdir / "metrics.jsonl")


def test_record_tells_validation_and_test_apart(finished):
    _, text, records = finished
    assert [record["epoch"] for record in records] == [1, 2, 3, 4]
    for record in records:
        for key, count in (("validation", 90), ("test", 100)):
            correct = record[f"{key}_accuracy"] * count
            assert correct == pytest.approx(round(correct))
            assert record[f"{key}_top5"] >= record[f"{key}_accuracy"]
        assert record["validation_loss"] != record["test_loss"]
    assert f"validation loss {records[0]['validation_loss']:.4f}" in text


def test_best_is_chosen_on_validation(finished):
    workdir, _, records = finished
    best_epoch = max(records, key=lambda record: record["validation_accuracy"])["epoch"]
    step = find_checkpoint(workdir, "best").step
    assert step == 2 * best_epoch
    with CheckpointStore(workdir / "checkpoints") as store:
        assert set(store.steps()) == {8, step}
    for which in (None, step):
        there, metrics = evaluate_run(workdir, which)
        record = records[there // 2 - 1]
        assert metrics == {key: value for key, value in record.items() if key in metrics}
        assert set(metrics) == {
            f"{split}_{name}" for split in ("validation", "test") for name in ("loss", "accuracy", "top5")
        }


def test_the_best_is_not_chosen_in_silence_among_those_that_are_left(finished, tmp_path, capsys):
    workdir, _, _ = finished
    shutil.copytree(workdir, tmp_path / "run")
    best = find_checkpoint(workdir, "best").step
    other = next(step for step in (8, 2, 4, 6) if step != best and (workdir / f"checkpoints/{step}").exists())
    (tmp_path / f"run/checkpoints/{best}/manifest.json").write_text("{}")
    found = find_checkpoint(tmp_path / "run", "best")
    assert found.step == other
    assert len(found.skipped) == 1
    assert f"checkpoints/{best} is damaged" in found.skipped[0]
    assert main(["compact", str(tmp_path / "run"), "--checkpoint", "best"]) == 1
    assert f"add --checkpoint {other}" in capsys.readouterr().err


def test_evaluation_says_what_best_means(finished, capsys):
    workdir, _, records = finished
    assert main(["eval", str(workdir), "--checkpoint", "best"]) == 0
    output = capsys.readouterr().out
    best = max(records, key=lambda record: record["validation_accuracy"])
    assert f"step {2 * best['epoch']} (the best on the validation images)" in output
    lines = [line.split() for line in output.splitlines()]
    assert ["validation_accuracy", f"{best['validation_accuracy']:.2%}"] in lines
    assert ["validation_loss", f"{best['validation_loss']:.4f}"] in lines
    assert ["test_accuracy", f"{best['test_accuracy']:.2%}"] in lines
    compacted = compact_run(workdir, evaluate=True).metrics
    assert compacted["validation_accuracy"] == pytest.approx(records[-1]["validation_accuracy"], abs=1 / 90)


@pytest.mark.parametrize(
    "questions", [5, *(pytest.param(number, marks=pytest.mark.slow) for number in (3, 4, 6, 7))]
)
def test_stopped_and_resumed_run_equals_an_unbroken_one(finished, tmp_path, monkeypatch, questions):
    """Stops in the first two epochs: between steps, and during the evaluation of either split."""
    console, _ = quiet_console()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "stop_request", lambda: StopAfter(questions))
        assert train_run(config(data={"validation": 90}), tmp_path / "b", console) == 128 + signal.SIGTERM
    assert resume_run(tmp_path / "b", console) == 0
    assert_same_end(tmp_path / "b", finished[0])
    kept = [
        [{key: value for key, value in record.items() if key != "images_per_second"} for record in records]
        for records in (finished[2], read_metrics(tmp_path / "b" / "metrics.jsonl"))
    ]
    assert kept[0] == kept[1]
    assert find_checkpoint(tmp_path / "b", "best") == find_checkpoint(finished[0], "best")


def test_held_out_images_are_the_same_for_every_seed_and_never_trained_on():
    held, steps = [], []
    for seed in (0, 7):
        trainer, data = run_setup.prepare(config(seed=seed, data={"validation": 0.25}))
        held.append(data.validation.images)
        steps.append(trainer.steps_per_epoch)
        rows = {image.tobytes() for image in data.validation.images}
        assert not any(image.tobytes() in rows for image in data.train.images)
    np.testing.assert_array_equal(held[0], held[1])
    assert steps == [3, 3]  # of 150 images


@pytest.mark.parametrize("streaming", [False, True])
def test_named_splits_resident_and_streamed(streaming):
    trainer, data = run_setup.prepare(config(eval_batch_size=30, data={**SPLITS, "streaming": streaming}))
    assert trainer.steps_per_epoch == 2
    state = trainer.initial_state()
    totals = {key: trainer.evaluate(state, split=key) for key in ("validation", "test")}
    assert {key: int(total.count) for key, total in totals.items()} == {"validation": 80, "test": 70}
    # Resident and streamed alike: what an evaluation counts is in the split.
    assert int(totals["test"].correct) <= 70
    assert len(data.validation) == 80


def test_evaluation_is_the_same_resident_and_streamed():
    results = []
    for streaming in (False, True):
        trainer, _ = run_setup.prepare(config(eval_batch_size=30, data={**SPLITS, "streaming": streaming}))
        state = trainer.initial_state()
        totals = [trainer.evaluate(state, split=key) for key in ("validation", "test")]
        results.append([(float(total.loss), int(total.correct)) for total in totals])
    np.testing.assert_allclose(results[0], results[1], rtol=1e-6)
    assert results[0][0] != results[0][1]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"validation": 0}, "data.validation is 0; it must be a whole number of images, at least 1, or"),
        ({"validation": -5}, "data.validation is -5"),
        ({"validation": 1.0}, "data.validation is 1.0; .*a fraction of them above 0 and below 1"),
        ({"validation": -0.1}, "data.validation is -0.1"),
        ({"validation": float("nan")}, "data.validation is nan"),
        ({"validation": "some"}, "configuration key 'data.validation'"),
        ({"validation": True}, "configuration key 'data.validation'"),
        ({"validation": 5, "validation_split": "test"}, "either held out or named. Leave out one of the two"),
    ],
)
def test_configurations_that_are_refused(data, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(data=data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"validation": 2000}, "data.validation is 2000 of 2000 training images"),
        ({"validation": 1600}, "batch_size is 500; .* 400 training images besides the 1600 to validate on"),
        ({"validation_split": "valid"}, "data.validation_split = 'valid': there is no split 'valid'"),
        ({"validation_split": "train[:10]"}, "share the images"),
        ({"test_split": "test[:"}, "data.test_split = 'test[:' is neither a split"),
    ],
)
def test_nothing_is_created_for_what_is_refused(tmp_path, data, message):
    message = message.replace("[", "\\[")
    data = {**ALL_IMAGES, **data}
    with pytest.raises(SelconvError, match=message) as caught:
        train_run(config(batch_size=500, data=data), tmp_path / "run", quiet_console()[0])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    file = tmp_path / "c.toml"
    file.write_text(
        "".join(f"data.{key} = {value!r}\n" for key, value in data.items()) + "batch_size = 500\n"
    )
    with pytest.raises(SelconvError, match=message):
        check_sweep(plan_sweep([file], tmp_path / "sweep", seeds=[0]))
    assert not (tmp_path / "sweep").exists()
