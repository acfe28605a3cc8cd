"""The command line in a process of its own: output, exit codes, signals, sudden death."""

import errno
import io
import json
import random
import signal
import statistics
import subprocess
import sys
import time

import pytest

from runs import ALL_IMAGES, assert_same_end, command, environment, tiny_config
from selconv_jax._cli.main import main
from selconv_jax.train._config import dump_config
from selconv_jax.train._metrics import read_metrics

pytestmark = pytest.mark.optimized

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A file of the tiny configuration."""
    path = tmp_path_factory.mktemp("config") / "tiny.toml"
    path.write_text(dump_config(tiny_config(batch_size=500, data=ALL_IMAGES)))
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
        "channels_block1_layer1_conv2.png",
        "learning_curves.png",
    ]
    for path in (workdir / "pictures").iterdir():
        assert path.read_bytes()[:8] == PNG


@pytest.mark.slow
def test_a_run_that_nobody_reads_is_the_same(config, finished, tmp_path):
    workdir = tmp_path / "run"
    with subprocess.Popen(
        command("train", config, "--workdir", workdir),
        env={**environment(), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == f"run in {workdir}\n"
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0
    assert (workdir / "pictures" / "learning_curves.png").read_bytes()[:8] == PNG
    assert_same_end(workdir, finished[0])


def test_show_prints_the_run_and_draws_elsewhere(finished, tmp_path, capsys):
    workdir, _ = finished
    assert main(["show", str(workdir), "--output", str(tmp_path / "drawn")]) == 0
    output = capsys.readouterr().out
    last = read_metrics(workdir / "metrics.jsonl")[-1]
    assert f"{100 * last['test_accuracy']:.2f}" in output
    assert "block1_layer1/conv1" in output
    drawn = {path.name: path.read_bytes() for path in (tmp_path / "drawn").iterdir()}
    assert drawn == {path.name: path.read_bytes() for path in (workdir / "pictures").iterdir()}


@pytest.mark.parametrize("option", ["--output", "--html"])
def test_show_draws_for_a_reader_who_leaves_after_the_tables(option, finished, tmp_path, capsys, monkeypatch):
    """As ``selconv show DIR | head`` may."""

    class Gone(io.StringIO):
        def write(self, text):
            if "drawing pictures" in text or "page in" in text:
                raise BrokenPipeError(errno.EPIPE, "Broken pipe")
            return super().write(text)

    target = tmp_path / "drawn.html"
    monkeypatch.setattr(sys, "stdout", Gone())
    assert main(["show", str(finished[0]), option, str(target)]) == 0
    assert capsys.readouterr().err == ""
    assert (target / "learning_curves.png" if option == "--output" else target).is_file()


def test_eval_prints_the_recorded_numbers(finished, capsys):
    workdir, _ = finished
    assert main(["eval", str(workdir)]) == 0
    last = read_metrics(workdir / "metrics.jsonl")[-1]
    output = capsys.readouterr().out
    assert "checkpoint of step 16" in output
    assert f"{last['test_accuracy']:.2%}" in output
    assert main(["eval", str(workdir), "--checkpoint", "3"]) == 1
    assert "no checkpoint of step 3" in capsys.readouterr().err


def test_sweep_compares_configurations(config, tmp_path, capsys):
    workdir = tmp_path / "sweep"
    vary = "optimizer.learning_rate=0.1,1e30"
    arguments = ["--vary", vary, "--seeds", "0,1", "--workdir", str(workdir), str(config), "epochs=1"]
    assert main(["sweep", *arguments]) == 1
    output = capsys.readouterr().out
    assert "failed: tiny/optimizer.learning_rate=1e30, seed 1: the loss of step" in output
    assert (workdir / "sweep.png").read_bytes()[:8] == PNG
    report = json.loads((workdir / "sweep.json").read_text())
    good, bad = report["configurations"]
    assert report["differences"] == []  # there is nothing to compare with
    assert good["configuration"] == "tiny/optimizer.learning_rate=0.1"
    assert good["resolved"]["epochs"] == 1
    assert good["seeds"] == bad["seeds"] == [0, 1]
    accuracies = [
        read_metrics(workdir / good["configuration"] / f"seed{seed}" / "metrics.jsonl")[-1]["test_accuracy"]
        for seed in (0, 1)
    ]
    mean, std = statistics.mean(accuracies), statistics.stdev(accuracies)
    assert good["summary"]["test_accuracy"] == {
        "mean": pytest.approx(mean),
        "std": pytest.approx(std),
        "count": 2,
    }
    assert [run["numbers"]["test_accuracy"] for run in good["runs"]] == accuracies
    assert [run["epochs"][0]["test_accuracy"] for run in good["runs"]] == accuracies
    assert good["runs"][1]["environment"]["seed"] == 1
    assert good["runs"][1]["directory"] == "tiny/optimizer.learning_rate=0.1/seed1"
    assert bad["summary"] == {}
    assert [run["complete"] for run in bad["runs"]] == [False, False]
    assert "not finite" in bad["runs"][0]["error"]
    assert f"{100 * mean:.2f}" in output
    assert f"± {100 * std:.2f}" in output
    assert "failed: seeds 0, 1" in " ".join(output.split())


def test_sweep_says_which_differences_are_larger_than_chance(config, tmp_path, capsys):
    other = tmp_path / "other.toml"
    other.write_text(config.read_text())
    arguments = [
        str(config),
        f"{other}@1",
        "epochs=1",
        "--seeds",
        "0,1",
        "--workdir",
        str(tmp_path / "sweep"),
    ]
    assert main(["sweep", *arguments]) == 0
    output = capsys.readouterr().out
    assert "minus that of tiny, in percentage points, paired by seed" in " ".join(output.split())
    report = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [part["seeds"] for part in report["configurations"]] == [[0, 1], [1]]
    (difference,) = report["differences"]
    assert (difference["configuration"], difference["baseline"]) == ("other", "tiny")
    assert difference["numbers"]["test_error"] == {
        "mean": 0.0,
        "std_error": None,
        "interval": None,
        "count": 1,
        "excludes_zero": False,
    }


def test_sweep_refuses_a_run_of_another_configuration(config, tmp_path, capsys):
    workdir = tmp_path / "sweep"
    (workdir / "tiny" / "seed0").mkdir(parents=True)
    (workdir / "tiny" / "seed0" / "config.toml").write_text("epochs = 3\n")
    assert main(["sweep", str(config), "--workdir", str(workdir), "--seeds", "0"]) == 1
    error = capsys.readouterr().err
    assert "tiny/seed0 holds a run of another configuration: epochs is 3 there and 4 here" in error
    assert [path.name for path in workdir.rglob("*") if path.is_file()] == ["config.toml"]


def test_sweep_refuses_a_directory_that_is_a_file(config, tmp_path, capsys):
    workdir = tmp_path / "file"
    workdir.touch()
    assert main(["sweep", str(config), "--workdir", str(workdir), "--seeds", "0"]) == 1
    assert f"the directory {workdir} of the sweep cannot be written" in capsys.readouterr().err


@pytest.mark.slow
def test_signal_stops_a_sweep_which_then_goes_on(config, tmp_path):
    workdir = tmp_path / "sweep"
    arguments = ["sweep", config, "epochs=2", "--seeds", "0", "--workdir", workdir]
    process = subprocess.Popen(
        command(*arguments),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for_first_epoch(workdir / "tiny" / "seed0" / "metrics.jsonl", process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "the sweep stopped with 0 of 1 runs complete" in output
    assert not (workdir / "sweep.json").exists()
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert "resuming from step" in done.stdout
    assert f"all results: {workdir / 'sweep.json'}" in done.stdout


def test_data_list_says_what_is_there(tmp_path, capsys):
    directory = tmp_path / "my sets"
    assert main(["data", "list", "--data-dir", str(directory)]) == 0
    output = capsys.readouterr().out
    assert "fashion_mnist_sample" in output
    assert "included" in output
    assert f"selconv data prepare cifar10 --from PATH --data-dir '{directory}'" in output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["tran"], 2, "there is no command 'tran'. Did you mean 'train'?"),
        (["data", "lst"], 2, "Did you mean 'list'?"),
        (
            ["compact", "run", "--multiple", "invalid choice: 'x'"],
            2,
            "argument --multiple: invalid int value",
        ),
        ([], 2, "COMMAND"),
        (["sweep"], 2, "CONFIG|KEY=VALUE"),
        (["sweep", "epochs=2"], 1, "a sweep needs at least one configuration file"),
        (["sweep", "none.toml"], 1, "there is no configuration file none.toml"),
        (["sweep", "none.toml", "--seeds", "0,x"], 1, "--seeds is '0,x'; it must be whole numbers"),
        (
            ["sweep", "none.toml@0,x"],
            1,
            "after @ of none.toml@0,x is '0,x'; it must be whole numbers",
        ),
        (["sweep", "none.toml", "--nice", "20"], 1, "--nice is 20; it must be in 0 .. 19"),
        (["sweep", "none.toml", "--vary", "epochs"], 1, "'epochs' is not of the form key=value1,value2"),
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


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        *(
            pytest.param(number, marks=pytest.mark.slow)
            for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
        ),
    ],
)
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
    if number == signal.SIGHUP:  # which a shell repeats
        process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + number, output
    assert f"resume with `selconv resume {workdir}`" in output
    done = run("resume", workdir)
    assert done.returncode == 0, done.stderr
    assert "resuming from step" in done.stdout
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


def test_models_lists_parameters_and_multiply_adds(capsys):
    assert main(["models", "densenet40"]) == 0
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if "densenet40" in line)
    # By hand: 663,552 for the stem, 2,400 for the classifier, the rest for the layers between.
    assert [word for word in row.replace("│", " ").split() if word != "M"] == [
        "densenet40",
        "211,978",
        "216,514",
        "54.3",
        "71.3",
        "71.4",
        "260.9",
    ]
    assert main(["models", "densnet40"]) == 1
    assert "Did you mean 'densenet40'?" in capsys.readouterr().err
