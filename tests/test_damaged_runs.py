"""Runs of which one file is damaged: a clear line, and never another evaluation than the one asked for."""

import errno
import json
import os
import random
import re
import shutil
from pathlib import Path

import pytest

from runs import assert_same_end, compiled_once, quiet_console, tiny_config
from selconv_jax import CheckpointError
from selconv_jax._cli import runs
from selconv_jax._cli.main import main
from selconv_jax.report._comparison import run_numbers
from selconv_jax.train._evaluation import compact_run, evaluate_run
from selconv_jax.train._loop import resume_run, train_run
from selconv_jax.train._metrics import read_metrics
from selconv_jax.train._workdir import read_environment

pytestmark = pytest.mark.optimized

LAST = 8


@pytest.fixture(scope="module", autouse=True)
def shared_programs():
    with compiled_once():
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A complete run of two epochs, with checkpoints of the steps 4 and 8."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    assert train_run(tiny_config(epochs=2), workdir, quiet_console()[0]) == 0
    return workdir


def cut(file, rng):
    file.write_bytes(file.read_bytes()[: rng.randrange(max(file.stat().st_size, 1))])


def flip(file, rng):
    content = bytearray(file.read_bytes())
    if content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def remove(file, rng):
    file.unlink()


def make_unreadable(file, rng):
    """Even for those whom permissions do not stop."""
    file.unlink()
    file.mkdir()


def damaged(finished, workdir, rng):
    """A copy of a run with one damaged file, and what was done to it."""
    shutil.rmtree(workdir, ignore_errors=True)
    shutil.copytree(finished, workdir)
    files = sorted(path for path in workdir.rglob("*") if path.is_file())
    # One place after another: there are far more files of arrays than others.
    place = rng.choice(sorted({file.relative_to(workdir).parts[:3] for file in files}))
    file = rng.choice([file for file in files if file.relative_to(workdir).parts[:3] == place])
    change = rng.choice([cut, flip, remove, make_unreadable])
    change(file, rng)
    return f"{change.__name__} {file.relative_to(workdir)}"


def outcome(arguments, capsys):
    """The exit code of a command, and what it printed and complained of."""
    code = main([str(argument) for argument in arguments])
    output, error = capsys.readouterr()
    assert code in (0, 1)
    assert "Traceback" not in output + error
    if code:
        assert error.startswith("selconv: error: "), error
        assert len(error.splitlines()) < 10
    return code, output, error


def cases(count, most):
    return [
        pytest.param(range(count), id="some"),
        pytest.param(range(count, most), id="many", marks=pytest.mark.slow),
    ]


@pytest.mark.parametrize("seeds", cases(24, 400))
def test_evaluated_is_what_was_asked_for_or_it_is_said(finished, tmp_path, capsys, seeds):
    expected = {4 * record["epoch"]: record for record in read_metrics(finished / "metrics.jsonl")}
    codes = []
    for seed in seeds:
        what = damaged(finished, tmp_path / "run", random.Random(seed))
        code, output, error = outcome(["eval", tmp_path / "run"], capsys)
        codes.append(code)
        if code == 0:
            step = int(re.search(r"checkpoint of step (\d+)", output)[1])
            assert step == LAST or f"{LAST} is damaged" in error, what
            for key in ("test_accuracy", "test_top5"):
                assert f"{key:<19} {expected[step][key]:.2%}" in output, what
    assert 0 in codes


@pytest.mark.parametrize("seeds", cases(3, 60))
def test_compacted_is_the_last_checkpoint_or_none(finished, tmp_path, capsys, seeds):
    for seed in seeds:
        what = damaged(finished, tmp_path / "run", random.Random(seed))
        code, output, _ = outcome(["compact", tmp_path / "run"], capsys)
        if code == 0:
            assert f"checkpoint of step {LAST}" in output, what
        else:
            assert not (tmp_path / "run" / "compact.npz").exists(), what


@pytest.mark.parametrize("seeds", cases(3, 60))
def test_shown_is_what_is_there_or_it_is_said(finished, tmp_path, capsys, seeds):
    for seed in seeds:
        what = damaged(finished, tmp_path / "run", random.Random(seed))
        outcome(["show", tmp_path / "run", "--output", tmp_path / "pictures"], capsys)
        assert what


@pytest.mark.parametrize("seeds", cases(4, 80))
def test_resumed_ends_as_the_unbroken_run_or_not_at_all(finished, tmp_path, capsys, seeds):
    for seed in seeds:
        what = damaged(finished, tmp_path / "run", random.Random(seed))
        code, output, _ = outcome(["resume", tmp_path / "run"], capsys)
        if code == 0:
            assert "skipped: " in output or f"from step {LAST} of {LAST}" in output, what
            assert_same_end(tmp_path / "run", finished)


def test_an_older_checkpoint_is_compacted_only_if_it_is_named(finished, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    (workdir / "checkpoints" / "8" / "manifest.json").write_text("{}")
    code, _, error = outcome(["compact", workdir], capsys)
    assert code == 1
    assert "checkpoints/8 is damaged: manifest.json has been altered" in error
    assert "To take that of step 4, add --checkpoint 4." in error
    with pytest.raises(CheckpointError, match="add --checkpoint 4"):
        compact_run(workdir)
    with pytest.raises(CheckpointError, match="add --checkpoint 4"):
        evaluate_run(workdir)
    code, output, error = outcome(["compact", workdir, "--checkpoint", "4"], capsys)
    assert (code, error) == (0, "")
    assert "checkpoint of step 4" in output


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("seed = 0", "seed = 7", "seed was 0 and is 7"),
        ("epochs = 2", "epochs = 3", "epochs was 2 and is 3"),
        ("batch_size = 50", "batch_size = 40", "batch_size was 50 and is 40"),
        ("growth = 4", "growth = 5", "model.options.growth was 4 and is 5"),
        ("threshold = 0.4", "threshold = 0.5", "allocation.threshold was 0.4 and is 0.5"),
    ],
)
def test_an_edited_configuration_is_noticed(finished, tmp_path, capsys, old, new, said):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    config = workdir / "config.toml"
    text = config.read_text()
    assert f"\n{old}\n" in text
    config.write_text(text.replace(f"\n{old}\n", f"\n{new}\n"))
    before = sorted(path.stat().st_mtime_ns for path in workdir.rglob("*") if path.name != ".lock")
    for command in ("eval", "resume", "show", "compact"):
        code, _, error = outcome([command, workdir], capsys)
        assert code == 1, command
        assert said in error
    assert before == sorted(path.stat().st_mtime_ns for path in workdir.rglob("*") if path.name != ".lock")


def test_what_does_not_change_the_result_may_be_edited_and_given(finished, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    config = workdir / "config.toml"
    config.write_text(config.read_text().replace("devices = 1", "devices = 99"))
    expected = outcome(["eval", finished], capsys)[1].splitlines()[1:]
    found = outcome(["eval", workdir], capsys)[1].splitlines()[1:]
    assert [line.split()[0] for line in found] == [line.split()[0] for line in expected]
    for one, other in zip(found, expected, strict=True):  # of 8 devices, which round in another order
        assert float(one.split()[1].rstrip("%")) == pytest.approx(
            float(other.split()[1].rstrip("%")), abs=0.2
        )
    assert outcome(["eval", workdir, "devices=1"], capsys)[1].splitlines()[1:] == expected
    code, _, error = outcome(["resume", workdir], capsys)
    assert code == 1
    assert "devices is 99; there are 8 (cpu). Add devices=8, or 0 for all." in error
    assert outcome(["resume", workdir, "devices=1"], capsys)[0] == 0
    for command in ("eval", "resume", "compact"):
        code, _, error = outcome([command, workdir, "seed=3"], capsys)
        assert code == 1
        assert "seed cannot be changed: it determines the result of the run" in error
        assert "data.directory" in error


def test_pictures_that_cannot_be_written(finished, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    code, _, error = outcome(["show", finished, "--output", tmp_path / "file" / "pictures"], capsys)
    assert code == 1
    assert f"{tmp_path / 'file'} is a file, not a folder. Choose another name" in error

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(runs, "draw_run", full)
    assert main(["resume", str(finished)]) == 0, "the run is complete"
    assert f"No space left on device. Draw them later by `selconv show {finished}`" in capsys.readouterr().err


@pytest.fixture
def copied(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_other_images_than_the_run_began_with_are_refused(copied, capsys):
    path = copied / "environment.json"
    environment = json.loads(path.read_text(encoding="utf-8"))
    assert environment["images"]["training images"] == "200"
    environment["images"]["training images"] = "96"
    path.write_text(json.dumps(environment), encoding="utf-8")
    for command in ("resume", "eval"):
        code, _, error = outcome([command, copied], capsys)
        assert code == 1
        assert "is not the data set that the run in" in error
        assert "(training images: 96 then, 200 now)" in error
        assert "data.directory=FOLDER" in error


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_no_result_depends_on_the_record_of_the_environment(content, copied, capsys):
    (copied / "environment.json").unlink()
    if content is not None:
        (copied / "environment.json").write_text(content, encoding="utf-8")
    assert read_environment(copied) is None
    assert outcome(["eval", copied], capsys)[0] == 0


def test_resuming_a_complete_run_changes_nothing(copied, capsys):
    before = (copied / "metrics.jsonl").read_bytes()
    console, text = quiet_console()
    assert resume_run(copied, console) == 0
    assert "complete already" in text.getvalue()
    assert (copied / "metrics.jsonl").read_bytes() == before


def test_missing_records_are_noticed(copied):
    path = copied / "metrics.jsonl"
    last = path.read_text(encoding="utf-8").splitlines()[-1]
    path.write_text(last + "\n", encoding="utf-8")
    console, text = quiet_console()
    assert resume_run(copied, console) == 0
    assert "metrics.jsonl lacks the records of epochs 1" in " ".join(text.getvalue().split())
    numbers = run_numbers(read_metrics(path))
    assert numbers["test_accuracy"] is not None
    assert (numbers["deallocated"], numbers["best_epoch"]) == (None, None)
