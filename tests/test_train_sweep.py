"""Sweeps: which runs, in which directories; what is kept, gone on with, refused and reported."""

import contextlib
import dataclasses
import json
import math
import re
import signal

import jax
import numpy as np
import pytest

from runs import TINY, StopAfter, assert_same_end, compiled_once, quiet_console, tiny_config
from selconv_jax import ConfigError, DataError
from selconv_jax._cli import sweep as sweep_command
from selconv_jax._cli.main import main
from selconv_jax.data._loading import open_data
from selconv_jax.train import _loop as loop
from selconv_jax.train._config import dump_config, parse_config
from selconv_jax.train._config_changes import with_changes
from selconv_jax.train._loop import NonFiniteLossError, train_run
from selconv_jax.train._metrics import read_metrics
from selconv_jax.train._sweeps.configurations import check_sweep, plan_sweep, split_values
from selconv_jax.train._sweeps.runs import SweepEnd, run_sweep
from selconv_jax.train._trainer import Trainer
from selconv_jax.train._workdir import read_config

pytestmark = pytest.mark.optimized


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A file of the tiny configuration, of one epoch."""
    path = tmp_path_factory.mktemp("config") / "tiny.toml"
    path.write_text(dump_config(parse_config({**TINY, "epochs": 1})))
    return path


@pytest.fixture(scope="module", autouse=True)
def shared_programs():
    with compiled_once():
        yield


def write(path, **keys):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump_config(parse_config({**TINY, **keys})))
    return path


def directories(runs, workdir):
    return [run.workdir.relative_to(workdir).as_posix() for run in runs]


def test_every_file_with_every_seed(tmp_path):
    files = [write(tmp_path / "b.toml"), write(tmp_path / "a.toml", batch_size=25)]
    runs = plan_sweep(files, tmp_path / "sweep", seeds=[3, 0], overrides=["epochs=7"])
    assert directories(runs, tmp_path / "sweep") == ["b/seed3", "b/seed0", "a/seed3", "a/seed0"]
    assert [run.name for run in runs[:2]] == ["b, seed 3", "b, seed 0"]
    assert runs[2].config == parse_config({**TINY, "batch_size": 25, "epochs": 7, "seed": 3})
    assert not (tmp_path / "sweep").exists()


def test_grid(tmp_path, tiny):
    runs = plan_sweep(
        [tiny],
        tmp_path,
        seeds=[0],
        vary=["model.variant=plain,selective", "model.options.blocks=[1],[1, 2]"],
    )
    # What a name of a directory cannot hold is told apart by a digest.
    assert [re.sub("-[0-9a-f]{8}/", "/", name) for name in directories(runs, tmp_path)] == [
        "tiny/model.variant=plain,model.options.blocks=1/seed0",
        "tiny/model.variant=plain,model.options.blocks=1,2/seed0",
        "tiny/model.variant=selective,model.options.blocks=1/seed0",
        "tiny/model.variant=selective,model.options.blocks=1,2/seed0",
    ]
    # People read the values as they wrote them.
    assert runs[1].name == "tiny/model.variant=plain,model.options.blocks=[1, 2], seed 0"
    alike = plan_sweep([tiny], tmp_path, seeds=[0], vary=["model.options.blocks=[[1],[2,3]],[[1,2],[3]]"])
    assert len({run.workdir for run in alike}) == 2
    assert runs[1].config.model.variant == "plain"
    assert runs[1].config.model.options["blocks"] == [1, 2]


def test_titles_leave_the_values_of_a_grid_whole():
    names = ["a/tiny/x=[1],y=../b", "a/tiny/x=[2],y=..//b"]
    assert sweep_command._titles(names) == ("a/tiny", ["x=[1],y=../b", "x=[2],y=..//b"])
    assert sweep_command._titles(["tiny/x=1", "other"]) == ("2 configurations", ["tiny/x=1", "other"])
    assert sweep_command._titles(["tiny", "tiny/x"]) == ("2 configurations", ["tiny", "tiny/x"])
    assert sweep_command._titles(["a/tiny"]) == ("a/tiny", ["a/tiny"])


def test_files_of_one_name_do_not_collide(tmp_path):
    files = [write(tmp_path / name) for name in ("x/run.toml", "y/run.toml", "y/other.toml", "z/x/run.toml")]
    runs = plan_sweep(files, tmp_path, seeds=[0])
    assert [run.configuration for run in runs] == [f"{tmp_path.name}/x/run", "y/run", "other", "z/x/run"]


def test_files_with_seeds_of_their_own(tmp_path):
    files = [write(tmp_path / "b.toml"), write(tmp_path / "a.toml")]
    runs = plan_sweep(files, tmp_path / "sweep", seeds=[0, 1, 2], own_seeds={files[1]: [2]})
    assert directories(runs, tmp_path / "sweep") == ["b/seed0", "b/seed1", "b/seed2", "a/seed2"]
    with pytest.raises(ConfigError, match=r"the seeds are \[3, 3\]"):
        plan_sweep(files, tmp_path, seeds=[0], own_seeds={files[0]: [3, 3]})


def test_runs_of_one_seed_are_pairs():
    """The same initial values of common variables, the same keys, the same images in the same order."""
    images = open_data("fashion_mnist_sample")

    def start(variant, seed):
        trainer = Trainer(tiny_config(seed=seed, batch_size=100, model={"variant": variant}), images)
        state = trainer.initial_state()
        variables = {
            jax.tree_util.keystr(path): np.asarray(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(state.variables)
        }
        with contextlib.closing(trainer.batches(state, 1)) as batches:
            order = np.asarray(next(batches)[-1])
        return variables, np.asarray(state.key), order

    plain, key, order = start("plain", seed=3)
    assert sorted(order) == list(range(2000))
    for variant, added in (("selective", {"gate", "source", "shift"}), ("gate_only", {"gate"})):
        variables, other_key, other_order = start(variant, seed=3)
        assert plain.keys() < variables.keys()
        assert {path.split("'")[-2] for path in variables.keys() - plain.keys()} == added
        for path, value in plain.items():
            np.testing.assert_array_equal(variables[path], value, err_msg=path)
        # Augmentation and dropout are drawn from the run's key and the step.
        np.testing.assert_array_equal(other_key, key)
        np.testing.assert_array_equal(other_order, order)
    variables, other_key, other_order = start("plain", seed=4)
    assert (other_order != order).any()
    assert any((variables[path] != value).any() for path, value in plain.items())


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a.b=1", ["1"]),
        ("a.b = 1, 2", ["1", "2"]),
        ("a.b={x=[1,2],y=3},4", ["{x=[1,2],y=3}", "4"]),
        ('a.b="x,y",z', ['"x,y"', "z"]),
    ],
)
def test_split_values(text, values):
    assert split_values(text) == ("a.b", values)


@pytest.mark.parametrize("text", ["a", "a=", "=1", "a=1,", "a=,1", "a=1,,2", "a=[1,2"])
def test_malformed_values(text):
    with pytest.raises(ConfigError, match="is not of the form key=value1,value2"):
        split_values(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": []}, r"the seeds are \[\]"),
        ({"seeds": [1, 1]}, r"the seeds are \[1, 1\]; name at least one, and each once"),
        ({"seeds": [-1]}, "seed is -1"),
        ({"vary": ["seed=1,2"]}, "use --seeds"),
        ({"overrides": ["seed=1"]}, "use --seeds"),
        (
            {"vary": ["epochs=1,2"], "overrides": ["epochs=3"]},
            "epochs is varied, and varied or set once more",
        ),
        ({"vary": ["epochs=1,2", "epochs=3,4"]}, "epochs is varied, and varied or set once more"),
        ({"vary": ["epochs=1,1"]}, "two runs would share the directory"),
        (
            {"vary": ["optimizer.learning_rate=0.1,0.2,1e-1"]},
            r"learning_rate=1e-1 and .*learning_rate=0\.1 are the same configuration",
        ),
        (
            {"vary": ["model.options={blocks=[1]},{blocks=[2]}"], "overrides": ["model.options.growth=7"]},
            r"model\.options\.growth is a part of model\.options, and both are varied or set",
        ),
        (
            {"vary": ["model.options.growth=2,4", "model.options={blocks=[1]},{blocks=[2]}"]},
            r"model\.options\.growth is a part of model\.options",
        ),
        (
            {"vary": ["model.options.growth=2,4"], "overrides": ["model.options={blocks=[1]}"]},
            r"model\.options\.growth is a part of model\.options",
        ),
        ({"vary": ["epoch=1,2"]}, r"tiny\.toml: unknown configuration key 'epoch'. Did you mean 'epochs'"),
        ({"vary": ["model.variant=plane"]}, r"tiny\.toml: .*model\.variant"),
    ],
)
def test_wrong_sweeps(tiny, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        plan_sweep([tiny], tmp_path, **{"seeds": [0], **changes})


def test_wrong_files(tiny, tmp_path):
    with pytest.raises(ConfigError, match="at least one configuration file"):
        plan_sweep([], tmp_path, seeds=[0])
    with pytest.raises(ConfigError, match=r"tiny\.toml is named twice"):
        plan_sweep([tiny, tiny], tmp_path, seeds=[0])
    with pytest.raises(ConfigError, match="there is no configuration file"):
        plan_sweep([tmp_path / "none.toml"], tmp_path, seeds=[0])
    files = [write(tmp_path / name) for name in ("a.toml", "x/seed0.toml", "a/seed0.toml")]
    with pytest.raises(ConfigError, match="would lie in the directory"):
        plan_sweep(files, tmp_path, seeds=[0, 1])


def test_what_cannot_be_trained_is_refused_before_anything_runs(tiny, tmp_path):
    vary = ["model.name=densenet40,densnet"]
    with pytest.raises(ConfigError, match=r"tiny/model\.name=densnet: there is no model 'densnet'"):
        check_sweep(plan_sweep([tiny], tmp_path / "sweep", seeds=[0], vary=vary))
    overrides = ["data.name=cifar10", f"data.directory={tmp_path}"]
    with pytest.raises(DataError, match="tiny: cifar10 is not prepared"):
        check_sweep(plan_sweep([tiny], tmp_path / "sweep", seeds=[0], overrides=overrides))
    assert not (tmp_path / "sweep").exists()


def test_runs_are_ordinary_ones_and_complete_ones_are_kept(tiny, tmp_path):
    console, text = quiet_console()
    runs = plan_sweep([tiny], tmp_path / "sweep", seeds=[0, 1])
    assert run_sweep(runs[:1], console).code == 0
    before = [(path, path.stat().st_mtime_ns) for path in runs[0].workdir.rglob("*")]
    check_sweep(runs)
    end = run_sweep(runs, console)
    assert (end.code, end.failures) == (0, {})
    assert "run 1 of 2: tiny, seed 0: complete already" in text.getvalue()
    assert [(path, path.stat().st_mtime_ns) for path in runs[0].workdir.rglob("*")] == before
    alone = tmp_path / "alone"
    assert train_run(tiny_config(epochs=1, seed=1), alone, console) == 0
    assert_same_end(runs[1].workdir, alone)
    assert all(run.is_complete for run in runs)


class SignalInTheSecondRun(StopAfter):
    """The second run of the sweep is asked to stop after some steps."""

    made = 0

    def __init__(self):
        type(self).made += 1
        super().__init__(3 if self.made == 2 else math.inf)


def test_stopped_sweep_goes_on(tiny, tmp_path, monkeypatch):
    console, text = quiet_console()
    runs = plan_sweep([tiny], tmp_path / "sweep", seeds=[0, 1, 2])
    with monkeypatch.context() as patch:
        patch.setattr(loop, "stop_request", SignalInTheSecondRun)
        end = run_sweep(runs, console)
    assert end.code == 128 + signal.SIGTERM
    assert "the sweep stopped with 1 of 3 runs complete" in text.getvalue()
    assert [run.has_started for run in runs] == [True, True, False]
    check_sweep(runs)
    assert run_sweep(runs, console).code == 0
    assert "resuming from step" in text.getvalue()
    assert [len(read_metrics(run.workdir / "metrics.jsonl")) for run in runs] == [1, 1, 1]
    alone = tmp_path / "alone"
    assert train_run(tiny_config(epochs=1, seed=1), alone, console) == 0
    assert_same_end(runs[1].workdir, alone)


def test_failed_runs_are_reported_and_the_others_are_made(tiny, tmp_path, monkeypatch):
    def failing(config, workdir, context):
        if config.seed == 1:
            raise NonFiniteLossError("the loss of step 3 (epoch 1) is not finite")
        if config.seed == 2:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nand many more lines")
        return loop.new_run(config, workdir, context)

    console, text = quiet_console()
    runs = plan_sweep([tiny], tmp_path / "sweep", seeds=[1, 2, 0])
    monkeypatch.setattr("selconv_jax.train._sweeps.one_run.new_run", failing)
    end = run_sweep(runs, console)
    assert end.code == 1
    assert end.failures == {
        "tiny, seed 1": "the loss of step 3 (epoch 1) is not finite",
        "tiny, seed 2": f"RuntimeError: RESOURCE_EXHAUSTED: out of memory (more in {runs[1].log})",
    }
    assert "Traceback" not in text.getvalue()
    assert "Traceback" in runs[1].log.read_text()
    assert [run.is_complete for run in runs] == [False, False, True]
    assert "failed: the loss of step 3" in text.getvalue()


def test_numbers_of_jobs(tiny, tmp_path, monkeypatch):
    runs = plan_sweep([tiny], tmp_path / "sweep", seeds=[0])
    with pytest.raises(ConfigError, match="--jobs is 0; it must be at least 1"):
        check_sweep(runs, 0)
    monkeypatch.setattr("jax.default_backend", lambda: "tpu")
    with pytest.raises(ConfigError, match="a TPU serves one process at a time"):
        check_sweep(runs, 2)


def test_run_of_another_configuration_is_refused_by_name(tiny, tmp_path):
    (run,) = plan_sweep([tiny], tmp_path / "sweep", seeds=[0])
    run.workdir.mkdir(parents=True)
    other = dataclasses.replace(run.config, epochs=9, batch_size=25)
    (run.workdir / "config.toml").write_text(dump_config(other))
    with pytest.raises(ConfigError, match=r"tiny/seed0 holds a run of another configuration: ") as caught:
        check_sweep([run])
    assert "epochs is 9 there and 1 here; batch_size is 25 there and 50 here. Choose" in str(caught.value)


def test_keys_that_do_not_change_the_result_may_change(tiny, tmp_path, monkeypatch):
    """As when a run is resumed."""
    (started,) = plan_sweep([tiny], tmp_path / "sweep", seeds=[0])
    started.workdir.mkdir(parents=True)
    (started.workdir / "config.toml").write_text(dump_config(started.config))
    changes = ['description="a \\"b\\" = c"', "eval_batch_size=25", "checkpoint_minutes=2.5"]
    overrides = [*changes, f"data.directory={tmp_path}"]
    (run,) = plan_sweep([tiny], tmp_path / "sweep", seeds=[0], overrides=overrides)
    check_sweep([run])
    resumed_with = []

    def resumed(workdir, context, overrides):
        resumed_with.append(with_changes(read_config(workdir), overrides))
        yield from ()
        return 0

    monkeypatch.setattr("selconv_jax.train._sweeps.one_run.resumed_run", resumed)
    assert run_sweep([run], quiet_console()[0]).code == 0
    assert resumed_with == [run.config]
    assert run.config.description == 'a "b" = c'


def test_results_of_runs_that_a_sweep_leaves_out_are_kept(tiny, tmp_path, monkeypatch, capsys):
    """More runs may be added; a picture that does not fit the report is removed."""
    monkeypatch.setattr(sweep_command, "run_sweep", lambda runs, *_, **__: SweepEnd(1, {runs[0].name: "x"}))
    report, picture = tmp_path / "sweep.json", tmp_path / "sweep.png"

    def sweep(seeds, rates):
        vary = f"optimizer.learning_rate={rates}"
        arguments = ["sweep", str(tiny), "--seeds", seeds, "--vary", vary, "--workdir", str(tmp_path)]
        assert main(arguments) == 1
        return capsys.readouterr().err

    assert sweep("0", "0.1,0.2") == ""
    written = json.loads(report.read_text())
    for part in written["configurations"]:
        part["runs"][0]["epochs"] = [{"epoch": 1}]
    report.write_text(json.dumps(written))
    picture.touch()
    before = report.read_text()
    error = sweep("0,1", "0.1")
    assert error.count("\n") == 1
    assert "runs that this sweep leaves out: tiny/optimizer.learning_rate=0.2, seed 0. Add" in error
    assert "learning_rate=0.1, seed 0; tiny" in sweep("1", "0.1,0.2")
    assert (report.read_text(), picture.exists()) == (before, True)
    assert sweep("0,1", "0.1,0.2,0.3") == ""
    assert not picture.exists()
    # Runs without an epoch have no results.
    assert sweep("0", "0.1") == ""
    assert len(json.loads(report.read_text())["configurations"]) == 1
    report.write_text("[]")
    assert "sweep.json is not the report of a sweep. Move it away" in sweep("0", "0.1")
