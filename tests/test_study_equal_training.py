"""The comparison with the authors' program: its statistics, its files, and the two sides' settings."""

import dataclasses
import itertools
import json
import re
import runpy
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from matplotlib.transforms import Bbox

from selconv_jax.train._config import dump_config, load_config
from selconv_jax.train._optimizer import learning_rate_schedule

STUDY = Path(__file__).resolve().parent.parent / "experiments" / "studies" / "equal_training"
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(STUDY)  # as for a script that is run; what it adds itself is taken back too
    COMPARE, COUPLED = (runpy.run_path(str(STUDY / name)) for name in ("compare.py", "coupled.py"))
CONFIG = load_config(STUDY / "selective.toml")
RESULTS = json.loads((STUDY / "results.json").read_text())
AUTHORS, SAME_START = (
    json.loads((STUDY / name).read_text())["runs"] for name in ("authors.json", "authors_same_start.json")
)


def metrics(accuracy, copies):
    """Of two epochs; all but accuracy and copies of the last one is fixed."""
    return {
        "epoch": [1, 2],
        "train_loss": [2.0, 1.0],
        "test_accuracy": [0.5, accuracy],
        "deallocated": [4, 0],
        "open_channels": [10, 9],
        "copies": [0, copies],
        "channels": [12, 12],
    }


def sides(here, there):
    """Runs of both sides from accuracies and copies after the last epoch."""
    return [
        [{"seed": seed, "metrics": metrics(*values)} for seed, values in enumerate(side)]
        for side in (here, there)
    ]


def test_differences_against_numbers_worked_out_by_hand():
    rows = COMPARE["compare"](*sides([(0.6, 5), (0.8, 5)], [(0.7, 60), (0.9, 60)]))
    assert len(rows) == 9
    by_name = {(row["quantity"], row["when"]): row for row in rows}
    accuracy = by_name["accuracy", "last epoch"]
    assert accuracy["means"] == pytest.approx([70, 80])
    # Standard deviation sqrt(200); squared standard error 200; t of 2 degrees of freedom at 97.5% is 4.3027.
    assert accuracy["deviations"] == pytest.approx([14.1421, 14.1421], abs=1e-4)
    reach = 4.3027 * 200**0.5
    assert accuracy["interval"] == pytest.approx((-10 - reach, -10 + reach), abs=1e-2)
    # Of nine at a joint 95%; t of 2 degrees of freedom has a closed form.
    a = 0.05 / 9
    reach *= (2 * (1 - a) ** 2 / (a * (2 - a))) ** 0.5 / 4.3027
    assert accuracy["joint_interval"] == pytest.approx((-10 - reach, -10 + reach), abs=1e-2)
    assert not accuracy["differs"]
    assert by_name["accuracy", "average of the epochs"]["difference"] == pytest.approx(-5)
    assert by_name["closed", "last epoch"]["means"] == [3, 3]
    assert by_name["closed", "average of the epochs"]["means"] == [2.5, 2.5]
    copies = by_name["copies", "last epoch"]
    assert copies["interval"] == (-55, -55)  # no variance
    assert [key for key, row in by_name.items() if row["differs"]] == [
        ("copies", "last epoch"),
        ("copies", "average of the epochs"),
    ]
    assert ("deallocated", "last epoch") not in by_name


def test_paired_differences_against_numbers_worked_out_by_hand():
    rows = COMPARE["compare"](*sides([(0.6, 5), (0.8, 5)], [(0.5, 4), (0.5, 4)]), COMPARE["paired_interval"])
    accuracy = next(row for row in rows if (row["quantity"], row["when"]) == ("accuracy", "last epoch"))
    # Differences 10 and 30: standard error 10; t of one degree of freedom at 97.5% is 12.7062.
    assert accuracy["interval"] == pytest.approx((20 - 127.062, 20 + 127.062), abs=1e-2)
    # One degree of freedom: Student's distribution is Cauchy's.
    reach = 10 * np.tan(np.pi / 2 * (1 - 0.05 / 9))
    assert accuracy["joint_interval"] == pytest.approx((20 - reach, 20 + reach), rel=1e-6)
    copies = next(row for row in rows if (row["quantity"], row["when"]) == ("copies", "last epoch"))
    assert copies["interval"] == (1, 1)
    assert copies["differs"]


def write_study(folder, epochs=2, seeds=(0, 1), paired_seeds=(0, 1)):
    """A study of two epochs with runs of both sides; the arguments that compare them."""
    study, runs = folder / "study", folder / "runs"
    study.mkdir()
    config = dataclasses.replace(CONFIG, epochs=2)
    (study / "selective.toml").write_text(dump_config(config))
    here, there = sides([(0.6, 5), (0.8, 7)], [(0.7, 6), (0.9, 8)])
    for run in there:
        run["metrics"] = {key: values[:epochs] for key, values in run["metrics"].items()}
    (study / "authors.json").write_text(json.dumps({"runs": there}))
    same = [{**run, "seed": seed} for run, seed in zip(there, paired_seeds, strict=True)]
    (study / "authors_same_start.json").write_text(json.dumps({"runs": same}))
    for seed in seeds:
        directory = runs / f"seed{seed}"
        directory.mkdir(parents=True)
        (directory / "config.toml").write_text(dump_config(dataclasses.replace(config, seed=seed)))
        environment = {"versions": {"jax": "1.2.3"}, "backend": "cpu", "device": "cpu", "devices": 1}
        (directory / "environment.json").write_text(json.dumps(environment))
        columns = here[seed]["metrics"]
        records = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return [str(runs), "--study", str(study)]


def test_files_made_of_runs(tmp_path):
    words = write_study(tmp_path)
    assert COMPARE["main"](words) == 0
    study = tmp_path / "study"
    text = (study / "table.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| test accuracy (%) | last epoch"))
    assert [cell.strip() for cell in row.strip("|").split("|")][2:5] == [
        "70.00 ± 14.14",
        "80.00 ± 14.14",
        "-10.00",
    ]
    assert "| 2 | 70.00 ± 14.14 | 80.00 ± 14.14 | 1.000 ± 0.000" in text
    assert "jax 1.2.3" in text
    names = ("results.json", "table.md", "equal_training.png")
    before = [(study / name).read_bytes() for name in names]
    (study / "table.md").unlink()
    assert COMPARE["main"](words[1:]) == 0
    assert [(study / name).read_bytes() for name in names] == before


@pytest.mark.parametrize(
    ("options", "missing", "message"),
    [
        ({"epochs": 1}, None, "differ in their epochs"),
        ({"seeds": (0,)}, None, "there is one run of this project"),
        (
            {"paired_seeds": (0, 2)},
            None,
            "authors_same_start.json has other seeds than the runs of this project",
        ),
        ({}, "authors_same_start.json", "there is no .*start.json: it holds the other side's numbers"),
        ({}, "authors.json", "there is no .*authors.json: it holds the other side's numbers"),
    ],
)
def test_what_cannot_be_compared_is_one_line(tmp_path, capsys, options, missing, message):
    words = write_study(tmp_path, **options)
    if missing:
        (tmp_path / "study" / missing).unlink()
    assert COMPARE["main"](words) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)
    assert not (tmp_path / "study" / "results.json").exists()


def test_table_and_picture_are_those_of_the_results(tmp_path):
    for name in ("authors.json", "authors_same_start.json", "results.json"):
        shutil.copy(STUDY / name, tmp_path)
    assert COMPARE["main"](["--study", str(tmp_path)]) == 0
    for name in ("results.json", "table.md"):
        assert (tmp_path / name).read_text() == (STUDY / name).read_text()


def test_both_sides_are_complete_and_have_the_same_settings():
    (row,) = RESULTS["results"]
    rates = learning_rate_schedule(CONFIG.optimizer, CONFIG.epochs * 2000 // CONFIG.batch_size)
    more = json.loads((STUDY / "more_seeds.json").read_text())
    first, others = [0, 1, 2, 3, 4], [5, 6, 7, 8, 9]
    for runs, seeds in (
        (row["runs"], first),
        (AUTHORS, first),
        (SAME_START, first),
        (more["here"], others),
        (more["there"], others),
    ):
        assert [run["seed"] for run in runs] == seeds
        for run in runs:
            columns = {key: np.array(values) for key, values in run["metrics"].items()}
            assert columns["epoch"].tolist() == list(range(1, CONFIG.epochs + 1))
            assert set(columns["channels"]) == {408}
            assert not columns["deallocated"][CONFIG.epochs // 2 :].any()
            assert columns["deallocated"][: CONFIG.epochs // 2].all()
            # Of the last step of every epoch.
            steps = columns["epoch"] * 2000 // CONFIG.batch_size - 1
            np.testing.assert_allclose(columns["learning_rate"], rates(steps), rtol=1e-4, atol=1e-8)
            opened = columns["reallocated"] - columns["deallocated"]
            np.testing.assert_array_equal(columns["open_channels"], 408 + np.cumsum(opened))


def assert_coupled(here, there):
    assert COUPLED["relative_differences"](here["loss"], there["loss"]).max() < 1e-9
    for key in ("closed", "copies", "test_correct"):
        assert here[key] == there[key][: len(here[key])]


def test_coupled_training_is_the_same_to_the_end():
    record = json.loads((STUDY / "coupled.json").read_text())
    here, there = record["here"], record["there"]
    assert len(here["loss"]) == len(there["loss"]) == CONFIG.epochs * COUPLED["STEPS"]
    assert len(here["copies"]) == len(there["copies"]) == CONFIG.epochs
    assert_coupled(here, there)


@pytest.mark.slow
def test_coupled_training_starts_as_recorded():
    there = json.loads((STUDY / "coupled.json").read_text())["there"]
    with jax.enable_x64(True):
        here = COUPLED["train"](3)
    assert len(here["loss"]) == 3
    assert_coupled(here, there)


def test_picture_has_a_panel_for_every_quantity_none_over_another():
    figure = COMPARE["picture"](RESULTS, AUTHORS, SAME_START)
    figure.draw_without_rendering()
    assert len(figure.axes) == len(COMPARE["QUANTITIES"]) + 1
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    for box, other in itertools.combinations(boxes, 2):
        overlap = Bbox.intersection(box, other)
        assert overlap is None or min(overlap.width, overlap.height) < 1
    whole = figure.get_tightbbox().extents  # in inches
    assert (whole[:2] >= 0).all()
    assert (whole[2:] <= figure.get_size_inches()).all()


def test_readme_states_what_the_files_hold():
    text = " ".join((STUDY / "README.md").read_text().split())
    first = json.loads((STUDY / "first_epoch.json").read_text())
    for side, statement in (("here", "42.4 ± 7.6% here"), ("there", "39.2 ± 10.2% there")):
        assert [run["seed"] for run in first[side]] == list(range(10, 25))
        accuracies = 100 * np.array([run["test_accuracy"] for run in first[side]])
        assert statement == f"{accuracies.mean():.1f} ± {accuracies.std(ddof=1):.1f}% {side}"
        assert statement in text
    rows = {(row["quantity"], row["when"]): row for row in RESULTS["comparison"]}
    for quantity, statement in (
        (
            "accuracy",
            "{0:.1f} ± {1:.1f}% of the test images are classified rightly here and {2:.1f} ± {3:.1f}%",
        ),
        ("closed", "{0:.1f} ± {1:.1f} and {2:.1f} ± {3:.1f} of 408 channels are closed"),
        ("copies", "{0:.1f} ± {1:.1f} and {2:.1f} ± {3:.1f} are copies"),
    ):
        row = rows[quantity, "last epoch"]
        means, deviations = row["means"], row["deviations"]
        assert statement.format(means[0], deviations[0], means[1], deviations[1]) in text
    assert not any(row["differs"] for key in ("comparison", "same_start") for row in RESULTS[key])
    outside = [row for row in RESULTS["same_start"] if not row["interval"][0] <= 0 <= row["interval"][1]]
    (row,) = outside
    assert (row["quantity"], row["when"]) == ("loss", "average of the epochs")
    assert "{:.3f} here and {:.3f} there".format(*row["means"]) in text
    assert "from {:.3f} to {:.3f}".format(*row["interval"]) in text
    more = json.loads((STUDY / "more_seeds.json").read_text())
    ten = COMPARE["compare"](
        RESULTS["results"][0]["runs"] + more["here"], SAME_START + more["there"], COMPARE["paired_interval"]
    )
    assert all(row["interval"][0] < 0 < row["interval"][1] for row in ten)
    by_name = {(row["quantity"], row["when"]): row for row in ten}
    assert "{:.3f} to {:+.3f}".format(*by_name["loss", "average of the epochs"]["interval"]) in text
    assert by_name["copies", "last epoch"]["difference"] == pytest.approx(0, abs=1e-9)
    record = json.loads((STUDY / "coupled.json").read_text())
    differences = COUPLED["relative_differences"](*(record[side]["loss"] for side in ("here", "there")))
    assert f"{differences.max():.1e} of their" in text
    for runs, statement in ((RESULTS["results"][0]["runs"], "180 of 180"), (AUTHORS, "177 of 177")):
        copies = np.array([run["metrics"]["copies"] for run in runs])[:, :6]
        survivors = copies - np.array([run["metrics"]["reallocated"] for run in runs])[:, :6]
        assert not survivors.any()
        assert statement == "{0} of {0}".format(copies[:, :-1].sum())
        assert statement in text
