"""The command line in a process of its own: output, exit codes, signals, sudden death."""

import random
import signal
import subprocess
import time

import pytest
from runs import TINY, assert_same_end, command, environment

from selconv_jax.cli.main import main
from selconv_jax.train.config import dump_config, parse_config
from selconv_jax.train.metrics import read_metrics

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A file of the tiny configuration."""
    path = tmp_path_factory.mktemp("config") / "tiny.toml"
    path.write_text(dump_config(parse_config(TINY)))
    return path


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """A complete run of the command and what it printed."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    done = run("train", config, "--workdir", workdir)
    assert done.returncode == 0, done.stderr
    return workdir, done.stdout


def run(*arguments, **options):
    return subprocess.run(
        command(*arguments), env=environment(), capture_output=True, text=True, timeout=300, **options
    )


def test_train_leaves_records_and_pictures(finished):
    workdir, output = finished
    assert "epoch 4/4" in output
    assert "\x1b" not in output  # plain lines, as it is no terminal
    pictures = sorted(path.name for path in (workdir / "pictures").iterdir())
    assert pictures == [
        "allocation.png",
        "channels_block1_layer1_conv1.png",
        "learning_curves.png",
    ]
    for path in (workdir / "pictures").iterdir():
        assert path.read_bytes()[:8] == PNG


def test_show_prints_the_run_and_draws_elsewhere(finished, tmp_path, capsys):
    workdir, _ = finished
    assert main(["show", str(workdir), "--output", str(tmp_path / "drawn")]) == 0
    output = capsys.readouterr().out
    last = read_metrics(workdir / "metrics.jsonl")[-1]
    assert f"{100 * last['test_accuracy']:.2f}" in output
    assert "block1_layer1/conv1" in output
    drawn = {path.name: path.read_bytes() for path in (tmp_path / "drawn").iterdir()}
    assert drawn == {path.name: path.read_bytes() for path in (workdir / "pictures").iterdir()}


def test_eval_prints_the_recorded_numbers(finished, capsys):
    workdir, _ = finished
    assert main(["eval", str(workdir)]) == 0
    last = read_metrics(workdir / "metrics.jsonl")[-1]
    output = capsys.readouterr().out
    assert "checkpoint of step 16" in output
    assert f"{last['test_accuracy']:.2%}" in output
    assert main(["eval", str(workdir), "--checkpoint", "3"]) == 1
    assert "no checkpoint of step 3" in capsys.readouterr().err


def test_data_list_says_what_is_there(tmp_path, capsys):
    assert main(["data", "list", "--data-dir", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "fashion_mnist_sample" in output
    assert "included" in output
    assert "selconv data prepare cifar10 --from PATH" in output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["tran"], 2, "there is no command 'tran'. Did you mean 'train'?"),
        (["data", "lst"], 2, "Did you mean 'list'?"),
        ([], 2, "COMMAND"),
        (["train", "none.toml"], 1, "there is no configuration file none.toml"),
        (["resume", "nowhere"], 1, "nowhere does not hold a run"),
        (["show", "nowhere"], 1, "nowhere does not hold a run"),
        (["eval", "nowhere"], 1, "nowhere does not hold a run"),
        (["data", "prepare", "cifar1"], 1, "Did you mean 'cifar10'?"),
        (["data", "prepare", "cifar10", "--from", "/none"], 1, "/none"),
    ],
)
def test_wrong_command_lines(arguments, code, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if code == 2:
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
    else:
        assert main(arguments) == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (0, 2, 1)])
def test_overrides_and_options_in_any_order(order, config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    parts = [[str(config)], ["--workdir", "here"], ["epochs=0"]]
    assert main(["train", *(word for part in order for word in parts[part])]) == 1
    assert "epochs is 0; it must be at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", str(config), "--workdr", "here"])
    assert "unrecognized arguments: --workdr" in capsys.readouterr().err


def test_wrong_override_and_key(config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(config), "epoch=3"]) == 1
    assert "unknown configuration key 'epoch'. Did you mean 'epochs'?" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_signal_saves_and_resume_goes_on(config, finished, tmp_path, number):
    workdir = tmp_path / "stopped"
    process = subprocess.Popen(
        command("train", config, "--workdir", workdir),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for_first_epoch(workdir / "metrics.jsonl", process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + number, output
    assert f"go on by `selconv resume {workdir}`" in output
    done = run("resume", workdir)
    assert done.returncode == 0, done.stderr
    assert "going on from step" in done.stdout
    assert_same_end(workdir, finished[0])


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_ends_bit_identically(config, finished, tmp_path):
    """SIGKILL, ten times in one run and again in others, until ten kills have hit a running process."""
    rng = random.Random(0)
    kills = number = 0
    while kills < 10:
        workdir, number = tmp_path / f"killed-{number}", number + 1
        arguments = ["train", config, "--workdir", workdir]
        while True:
            process = subprocess.Popen(
                command(*arguments),
                env=environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            # From within the start of the program to its last steps.
            try:
                output, _ = process.communicate(timeout=rng.uniform(2.0, 25.0))
            except subprocess.TimeoutExpired:
                process.kill()
                output, _ = process.communicate()
                kills += 1
            else:
                assert process.returncode == 0, output
                break
            if (workdir / "config.toml").exists():
                arguments = ["resume", workdir]
        assert_same_end(workdir, finished[0])
        assert len(read_metrics(workdir / "metrics.jsonl")) == 4
    assert kills >= 10


def wait_for_first_epoch(path, process):
    """Until an epoch has been recorded; fails if the process ends first."""
    deadline = time.monotonic() + 200
    while not path.exists() or not path.read_text():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
