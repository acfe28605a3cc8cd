"""Trackers of a run: what they are told, and that none of them stops it."""

import dataclasses
import sys
import types

import pytest

from runs import quiet_console, tiny_config
from selconv_jax import ConfigError
from selconv_jax.train import read_metrics, train_run
from selconv_jax.train._metrics import MetricsLog
from selconv_jax.train._trackers import check_tracker, open_tracker


class Recorder:
    """A tracker that remembers its calls, and fails in one of them."""

    def __init__(self, failing=None):
        self.calls, self.failing = [], failing

    def __call__(self, workdir, config):
        return self._note("open", workdir, config) or self

    def write(self, epoch, values):
        self._note("write", epoch, values)

    def close(self):
        self._note("close")

    def _note(self, name, *arguments):
        self.calls.append((name, *arguments))
        if name == self.failing:
            raise RuntimeError("no\nservice")


@pytest.fixture
def tracker_of(monkeypatch):
    def named(recorder):
        module = types.ModuleType("tracker_of_user")
        module.__spec__ = types.SimpleNamespace()
        module.start = recorder
        monkeypatch.setitem(sys.modules, "tracker_of_user", module)
        return "tracker_of_user:start"

    return named


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("wandbb", r"tracker is 'wandbb'; it must be \"wandb\", \"mlflow\", or a function"),
        ("nowhere:start", r"there is no module nowhere here: put it on PYTHONPATH"),
        ("nowhere.inner:start", r"there is no module nowhere.inner here"),
        (":start", r"tracker is ':start'; it must be"),
        ("os:start", r"the module os has no function 'start'"),
        ("os:sep", r"the module os has no function 'sep'"),
        ("unimportable:start", r"importing unimportable fails \(RuntimeError: not today\)"),
    ],
)
def test_trackers_that_do_not_exist_are_refused_before_anything_is_made(tmp_path, monkeypatch, name, said):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "unimportable.py").write_text("raise RuntimeError('not today')\n")
    with pytest.raises(ConfigError, match=said):
        train_run(tiny_config(tracker=name), tmp_path / "run", quiet_console()[0])
    assert not (tmp_path / "run").exists()


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ConfigError, match=r"no module mlflow here: pip install 'selconv-jax\[mlflow\]', or"):
        check_tracker("mlflow")
    check_tracker(None)


def test_a_run_without_a_tracker_has_none(tmp_path):
    assert open_tracker(tiny_config(), tmp_path, print) is None


@pytest.mark.parametrize("failing", [None, "open", "write", "close"])
def test_what_a_tracker_is_told_and_what_becomes_of_its_failures(tmp_path, tracker_of, failing):
    recorder, said = Recorder(failing), []
    config = tiny_config(tracker=tracker_of(recorder))
    check_tracker(config.tracker)
    tracker = open_tracker(config, tmp_path, said.append)
    log = MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "events", 0, said.append, tracker)
    for epoch in (1, 2):
        log.write({"epoch": epoch, "train_loss": 1.0 / epoch, "images_per_second": None})
    log.close()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2
    calls = [
        ("open", tmp_path, dataclasses.asdict(config)),
        ("write", 1, {"train_loss": 1.0}),
        ("write", 2, {"train_loss": 0.5}),
        ("close",),
    ]
    made = {None: 4, "open": 1, "write": 2, "close": 4}[failing]
    assert recorder.calls == calls[:made]
    message = f"no more records for the tracker {config.tracker}: no service"
    assert said == ([] if failing is None else [message])


def test_a_run_is_tracked(tmp_path, tracker_of):
    recorder, (console, text) = Recorder("close"), quiet_console()
    config = tiny_config(epochs=1, tracker=tracker_of(recorder))
    assert train_run(config, tmp_path / "run", console) == 0
    (record,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    del record["epoch"]
    _, (_, epoch, values), _ = recorder.calls
    assert epoch == 1
    assert values == {name: value for name, value in record.items() if value is not None}
    assert "note: no more records for the tracker" in text.getvalue()


@pytest.mark.slow
def test_weights_and_biases_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    said = []
    for epoch in (1, 2):  # the second time as a resumed run
        tracker = open_tracker(tiny_config(tracker="wandb"), tmp_path, said.append)
        tracker.write(epoch, {"train_loss": 0.123456 * epoch})
        tracker.close()
    identity = (tmp_path / "wandb.id").read_text().strip()
    files = list((tmp_path / "wandb").glob(f"offline-run-*/run-{identity}.wandb"))
    written = b"".join(file.read_bytes() for file in files)
    assert b"0.123456" in written
    assert b"0.246912" in written
    assert said == []


@pytest.mark.slow
def test_mlflow_in_a_folder(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    said = []
    for epoch in (1, 2):
        tracker = open_tracker(tiny_config(tracker="mlflow"), tmp_path, said.append)
        tracker.write(epoch, {"train_loss": 1.0 / epoch})
        tracker.close()
    client, identity = mlflow.MlflowClient(), (tmp_path / "mlflow.id").read_text().strip()
    history = client.get_metric_history(identity, "train_loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 1.0), (2, 0.5)]
    run = client.get_run(identity)
    assert run.info.status == "FINISHED"
    assert run.data.params["allocation.top_k"] == "3"
    assert said == []
