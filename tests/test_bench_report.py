"""Tables, JSON and pictures of benchmarks say what was measured."""

import io
import json

import pytest
from rich.console import Console

from selconv_jax._bench import run
from selconv_jax._bench.cases import Case
from selconv_jax._bench.picture import bar_picture, panels_of
from selconv_jax._bench.progress import BenchProgress
from selconv_jax._bench.report import compile_table, memory_table, report_of, time_table
from selconv_jax._bench.rows import Ratio, rows_of
from selconv_jax._bench.run import Measured, NetworkResult, measure
from selconv_jax._bench.settings import BenchSettings
from selconv_jax._bench.workbench import Prepared
from selconv_jax.errors import SelconvError

MEMORY = {"arguments": 4_000_000, "outputs": 4_000_000, "in_place": 3_000_000, "temporary": 5_000_000}


def case(name, group="training step", base=None, rival=None, images=8):
    return Case(name, group, base, rival, images, prepare=lambda: pytest.fail("not to be called"))


RESULT = NetworkResult(
    "densenet40",
    [
        Measured(
            case("plain", rival="torch plain"),
            {"tracing": 1.0, "compiling": 2.0},
            {**MEMORY, "total": 10_000_000},
        ),
        Measured(
            case("selective, capacity 0.5", base="plain"),
            {"tracing": 1.5, "compiling": 4.0},
            {**MEMORY, "total": 15_000_000},
        ),
        Measured(case("torch plain")),
        Measured(case("one round", "re-allocation", base="plain", images=0)),
        Measured(case("never timed")),
    ],
    [
        {"plain": 0.1, "selective, capacity 0.5": 0.2, "torch plain": 0.2, "one round": 0.01},
        {"torch plain": 0.5, "one round": 0.02, "plain": 0.2, "selective, capacity 0.5": 0.3},
        {"plain": 0.4, "selective, capacity 0.5": 0.4},
    ],
    complete=False,
    notes=["a note"],
)


def printed(table):
    text = io.StringIO()
    Console(file=text, width=150).print(table)
    return text.getvalue()


def row_of(text, name):
    line = next(line for line in text.splitlines() if line.startswith(f" {name}"))
    return line.removeprefix(f" {name}").split()


def test_ratios_by_hand():
    rows = {row.name: row for row in rows_of(RESULT)}
    assert rows["plain"].ratio is None
    assert rows["plain"].images_per_second == pytest.approx(40.0)
    assert rows["plain"].torch_ratio == Ratio("torch plain", pytest.approx(0.2 / 0.35), pytest.approx(0.45))
    selective = rows["selective, capacity 0.5"]
    assert selective.ratio == Ratio("plain", pytest.approx(1.5), pytest.approx(1.5))
    assert selective.memory_ratio == 1.5
    assert selective.torch_ratio is None
    assert rows["one round"].images_per_second is None
    assert rows["never timed"].summary is None


def test_tables():
    text = printed(time_table(RESULT, "title [x]"))
    assert "title [x]" in text  # no markup
    assert row_of(text, "plain")[0] == "200.0"
    assert row_of(text, "selective, capacity 0.5") == [
        *("300.0", "250.0", "-", "350.0", "200.0", "3", "27", "1.50", "(1.50)")
    ]
    assert "never timed" not in text
    assert row_of(printed(memory_table(RESULT, "memory")), "selective, capacity 0.5") == [
        *("4.0", "4.0", "3.0", "5.0", "15.0", "1.50")
    ]
    assert row_of(printed(compile_table(RESULT, "compile")), "plain") == ["1.00", "2.00", "3.00"]


def test_report_holds_every_number():
    settings = BenchSettings(what=("step", "compile"))
    report = json.loads(json.dumps(report_of(settings, {"cores": 2}, [RESULT])))
    assert report["settings"]["capacity"] == [0.0, 0.125, 0.25, 0.5, 1.0]
    assert report["environment"] == {"cores": 2}
    (network,) = report["networks"]
    assert network["model"] == "densenet40"
    assert network["complete"] is False
    assert network["notes"] == ["a note"]
    assert network["rounds"] == list(RESULT.rounds)
    assert list(network["rounds"][1]) == ["torch plain", "one round", "plain", "selective, capacity 0.5"]
    selective = network["cases"][1]
    assert selective["seconds"] == [0.2, 0.3, 0.4]
    assert selective["summary"]["median"] == 0.3
    assert selective["ratio"] == {"to": "plain", "medians": pytest.approx(1.5), "paired": pytest.approx(1.5)}
    assert selective["compile"] == {"tracing": 1.5, "compiling": 4.0}
    assert selective["memory"]["total"] == 15_000_000
    without = report_of(BenchSettings(what=("step",)), {}, [RESULT])
    assert without["networks"][0]["cases"][1]["compile"] is None


def test_picture_draws_medians_and_quartiles():
    panels = panels_of(RESULT)
    assert [panel.title for panel in panels] == ["densenet40: training step", "densenet40: re-allocation"]
    steps, _ = bar_picture(panels, "title", "caption").axes
    assert [label.get_text() for label in steps.get_yticklabels()] == [
        *("plain", "selective, capacity 0.5", "torch plain")
    ]
    assert [bar.get_width() for bar in steps.patches] == pytest.approx([200, 300, 350])
    assert [text.get_text() for text in steps.texts][1] == "300 ms   1.50 x plain"
    assert "0.57 x PyTorch" in steps.texts[0].get_text()
    quartiles = [segments.get_segments()[0][:, 0] for segments in steps.collections]
    assert list(quartiles[1]) == pytest.approx([250, 350])
    with pytest.raises(SelconvError, match="nothing was timed"):
        bar_picture([], "title", "caption")


def test_stopping_before_anything_is_timed():
    text = io.StringIO()
    progress = BenchProgress(Console(file=text, width=100), "tiny", clock=lambda: 0.0)
    assert measure([case("a"), case("b")], 3, 0, progress, lambda: True) == ([], [], False)
    progress.preparing(0, 2, "a")
    progress.turn(0, 3, "a")
    progress.close()
    assert text.getvalue() == "tiny: compiling 1/2, a\n"


def test_times_are_those_of_one_step(monkeypatch):
    monkeypatch.setattr(run, "take_rounds", lambda calls, *_, **__: [dict.fromkeys(calls, 6.0)] * 2)

    def one(name, timed, steps):
        return Case(name, "training step", None, None, 8, lambda: Prepared(print), timed, steps)

    cases = [one("a", True, 3), one("compiled only", False, 3), one("b", True, 1)]
    progress = BenchProgress(Console(file=io.StringIO()), "tiny")
    measured, rounds, complete = measure(cases, 2, 0, progress, lambda: False)
    assert [found.case.name for found in measured] == ["a", "compiled only", "b"]
    assert rounds == [{"a": 2.0, "b": 6.0}] * 2
    assert complete
