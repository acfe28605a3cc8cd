"""The page of a run, and the record of its rounds that the page shows."""

import json
import re

import numpy as np
import pytest

from runs import quiet_console, tiny_config
from selconv_jax import SelconvError
from selconv_jax._cli.main import main
from selconv_jax.analysis._layer_counts import Count, LayerCounts
from selconv_jax.report._layer_allocation import LayerAllocation
from selconv_jax.report._page import RoundOfRun, run_page
from selconv_jax.report._page_charts import Line, chart
from selconv_jax.train import read_metrics, train_run
from selconv_jax.train._round_log import RoundLog, read_rounds

RECORDS = [
    {"epoch": 1, "train_loss": 2.5, "test_accuracy": 0.25, "images_per_second": None, "channels": 4},
    {"epoch": 2, "train_loss": 1.25, "test_accuracy": 0.5, "images_per_second": 1234.5, "channels": 4},
]
COUNTS = [LayerCounts("conv", Count(100, 1000), Count(104, 1200), Count(52, 600))]


def layer(gate, source):
    shift = np.zeros((4, 2)) + np.array([0.5, -1.25])
    return LayerAllocation("conv", np.array(gate, bool), np.array(source), shift, None, 8)


def rounds_of(count):
    first = RoundOfRun(10, [layer([1, 1, 0, 0], [-1, -1, -1, -1])], {"conv": [2, 3]})
    second = RoundOfRun(20, [layer([1, 1, 1, 0], [-1, -1, 0, -1])], {"conv": [2]})
    return [first, *(second._replace(step=10 * number) for number in range(2, count + 1))]


def data_of(page):
    return json.loads(re.search(r'<script id="rounds" type="application/json">(.*?)</script>', page)[1])


def test_the_rounds_are_in_the_page():
    page = run_page("run <1> {data}", {"threshold": "0.1"}, RECORDS, rounds_of(2), COUNTS)
    data = data_of(page)
    assert [each["text"] for each in data["rounds"]] == [
        "after step 10: 2 slots closed by this round, 0 copies, 2 closed",
        "after step 20: 1 slots closed by this round, 1 copies, 1 closed",
    ]
    (conv,) = data["layers"]
    assert [each["states"] for each in conv["rounds"]] == ["ooxx", "oocx"]
    assert [each["closed"] for each in conv["rounds"]] == [[2, 3], [2]]
    assert conv["rounds"][1]["copies"] == {"2": [0, 0.5, -1.25]}
    assert "<h1>run &lt;1&gt; {data}</h1>" in page
    assert "<td>conv<td>4<td>2<td>1<td>1<td>3" in page  # closed three times
    assert 'max="1" value="1"' in page
    assert "<td>conv<td>100<td>104<td>52<td>1,000<td>1,200<td>600" in page
    assert "<td>2<td>1.25<td>0.5<td>1,234<td>4" in page


def test_the_page_needs_nothing_else():
    page = run_page("run", {}, RECORDS, rounds_of(2), "not counted")
    assert not re.search(r"(src|href)=|https?:|@import|url\(", page)
    assert "<p>not counted</p>" in page


def test_long_runs_show_some_of_their_rounds():
    data = data_of(run_page("run", {}, RECORDS, rounds_of(150), COUNTS))
    assert len(data["rounds"]) == 60
    assert data["rounds"][0]["text"].startswith("after step 10:")
    assert data["rounds"][-1]["text"].startswith("after step 1,500:")
    assert data["rounds"][-1]["text"].endswith("(60 of 150 rounds are shown)")


def test_plain_networks_and_runs_that_have_not_begun():
    page = run_page("run", {}, RECORDS, [], COUNTS)
    assert 'id="round"' not in page
    assert data_of(page) == {"rounds": [], "layers": []}
    with pytest.raises(SelconvError, match="no finished epoch"):
        run_page("run", {}, [], [], COUNTS)


def test_charts_leave_out_what_is_not_known():
    lines = [Line("a", "red", np.array([1.0, 2.0, np.nan, 4.0])), Line("b", "blue", np.full(4, np.nan))]
    picture = chart("Loss <x>", np.arange(1.0, 5.0), lines)
    (points,) = re.findall(r'<polyline points="([^"]*)"', picture)
    assert len(points.split()) == 2, "the line goes on over the gap"
    assert picture.count("<circle") == 3
    many = chart("Loss", np.arange(100.0), [Line("a", "red", np.where(np.arange(100) == 50, np.nan, 1.0))])
    assert (many.count("<polyline"), many.count("<circle")) == (2, 0)
    alone = chart("Loss", np.arange(100.0), [Line("a", "red", np.where(np.arange(100) == 50, 1.0, np.nan))])
    assert (alone.count("<polyline"), alone.count("<circle")) == (0, 1)
    assert "blue" not in picture
    assert "Loss &lt;x&gt;" in picture
    assert "nan" not in picture
    assert "nan" not in chart("Constant", np.array([1.0]), [Line("a", "red", np.zeros(1))])


def test_curves_are_broken_at_lost_epochs():
    records = [{"epoch": epoch, "train_loss": 1.0} for epoch in (1, 2, 5, 6, 7)]
    page = run_page("run", {}, records, [], COUNTS)
    lengths = [len(points.split()) for points in re.findall(r'<polyline points="([^"]*)"', page)]
    assert lengths == [2, 3]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three epochs, with a round after each of the first two."""
    workdir = tmp_path_factory.mktemp("page") / "run"
    config = tiny_config(epochs=3, allocation={"until": 1.0, "threshold": 0.3})
    assert train_run(config, workdir, quiet_console()[0]) == 0
    return workdir


def test_a_run_leaves_its_rounds(run):
    rounds, records = read_rounds(run / "rounds"), read_metrics(run / "metrics.jsonl")
    assert len(rounds) == 2
    for each, record in zip(rounds, records, strict=False):
        arrays = each.layers.values()
        assert sum(of_layer["gate"].sum() for of_layer in arrays) == record["open_channels"]
        assert sum(of_layer["deallocated"].sum() for of_layer in arrays) == record["deallocated"] > 0
        copies = sum((of_layer["source"] >= 0).sum() for of_layer in arrays if "source" in of_layer)
        assert copies == record["copies"]


def test_show_writes_the_page(run, tmp_path, capsys):
    (run / "rounds" / "000000000.npz").write_bytes(b"damaged")
    assert main(["show", str(run), "--html", str(tmp_path / "run.html")]) == 0
    assert f"page in {tmp_path / 'run.html'}" in capsys.readouterr().out
    data = data_of((tmp_path / "run.html").read_text(encoding="utf-8"))
    assert len(data["rounds"]) == 2
    assert main(["show", str(run), "--html", str(tmp_path / "run.png")]) == 1
    assert "the page needs a name that ends in .html" in capsys.readouterr().err
    assert main(["show", str(run), "--html", str(tmp_path / "nowhere" / "run.html")]) == 1
    assert "there is no folder" in capsys.readouterr().err
    (tmp_path / "folder.html").mkdir()
    for option, path in (
        ("--html", "folder.html"),
        ("--html", "run.html/run.html"),
        ("--output", "run.html/pictures"),
    ):
        assert main(["show", str(run), option, str(tmp_path / path)]) == 1
        captured = capsys.readouterr()
        assert captured.out == ""  # refused before the tables are made
        assert re.search(r"folder\.html is a folder|run\.html is a file, not a folder", captured.err)


def test_rounds_that_cannot_be_written_end_nothing(tmp_path, monkeypatch):
    said = []
    (tmp_path / "rounds").touch()
    log = RoundLog(tmp_path / "rounds", said.append)
    monkeypatch.setattr("selconv_jax.train._round_log.layer_states", lambda variables: {})
    state = type("State", (), {"variables": {}, "step": 3})()
    for _ in range(2):
        log.write(state, None)
    (message,) = said
    assert message.startswith(f"no more rounds are recorded: {tmp_path / 'rounds'} cannot be written: ")
