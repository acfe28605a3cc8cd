"""Studies: what their configurations vary, and the numbers, table and picture made of their runs."""

import dataclasses
import itertools
import json
import math
import re
import runpy
import time
from pathlib import Path

import pytest
from tensorboardX import SummaryWriter

from selconv_jax.train._config import dump_config, load_config

STUDIES = Path(__file__).resolve().parent.parent / "experiments" / "studies"
LOOKING = STUDIES / "looking_around"
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(STUDIES)  # as for a script that is run
    PICTURE = runpy.run_path(str(STUDIES / "accuracy_picture.py"))
    REPORT = runpy.run_path(str(STUDIES / "report.py"))
NAMES = [file.stem for file in sorted(LOOKING.glob("*.toml"))]

# Accuracies of the last epoch by seed.
PLAIN = {0: 0.50, 1: 0.54, 2: 0.52}
SELECTIVE = {0: 0.60, 1: 0.70, 2: 0.62}


def configuration(name, **changes):
    return dataclasses.replace(load_config(LOOKING / f"{name}.toml"), **changes)


def write_run(directory, config, accuracy, epochs=2, copies=None):
    """A directory as a run of two epochs leaves it."""
    directory.mkdir(parents=True)
    (directory / "config.toml").write_text(dump_config(config))
    environment = {"seed": config.seed, "versions": {"jax": "1.2.3"}, "backend": "cpu", "device": "cpu"}
    (directory / "environment.json").write_text(json.dumps({**environment, "devices": 1}))
    records = [
        {
            "epoch": 1,
            "test_accuracy": 0.9,
            "deallocated": 4,
            "open_channels": 190,
            "copies": 4,
            "channels": 192,
        },
        {"epoch": 2, "test_accuracy": accuracy, "deallocated": 0, "open_channels": 190, "copies": copies}
        | {"channels": 192},
    ]
    if copies is None:
        records = [{"epoch": r["epoch"], "test_accuracy": r["test_accuracy"]} for r in records]
    text = "".join(json.dumps(record) + "\n" for record in records[:epochs])
    (directory / "metrics.jsonl").write_text(text)


def write_study(folder):
    """A study of two configurations and its runs, one of them incomplete; returns both folders."""
    study, runs = folder / "study", folder / "runs"
    study.mkdir()
    for name in ("1_plain", "2_selective"):
        config = configuration(name, epochs=2)
        (study / f"{name}.toml").write_text(dump_config(config))
        accuracies, copies = (PLAIN, None) if name == "1_plain" else (SELECTIVE, 60)
        for seed, accuracy in accuracies.items():
            seeded = dataclasses.replace(config, seed=seed)
            write_run(runs / f"{name}/seed{seed}", seeded, accuracy, copies=copies)
    write_run(runs / "2_selective/seed7", dataclasses.replace(config, seed=7), 0.1, epochs=1)
    write_run(runs / "other", dataclasses.replace(config, description="Something else"), 0.1)
    return study, runs


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    study, runs = write_study(tmp_path_factory.mktemp("made"))
    with SummaryWriter(str(runs / "1_plain/seed0/tensorboard")) as writer:
        writer.add_scalar("x", 1.0, 1, walltime=time.time() + 7200)
    assert REPORT["main"]([str(study), str(runs)]) == 0
    return study


def cells(text, name):
    row = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_table(made):
    """Against numbers worked out by hand: of the differences 10, 16, 10 points."""
    text = (made / "table.md").read_text()
    assert "### Fashion-MNIST" in text
    plain, selective = cells(text, "plain 1x1"), cells(text, "selective")
    assert plain[1:8] == ["0, 1, 2", "52.00 ± 2.00", "-", "-", "-", "-", "6,954"]
    # Standard deviation sqrt(12), standard error 2; t of 2 degrees of freedom at 97.5% is 4.3027.
    assert selective[1:5] == ["0, 1, 2", "64.00 ± 5.29", "+12.00 ± 2.00", "+3.39 to +20.61"]
    assert selective[5:9] == ["60 of 192", "2", "7,338", "2.13 M"]
    assert "not complete: 2_selective, fashion_mnist, seed 7" in text
    assert "jax 1.2.3" in text


def test_other_runs_of_the_results_are_kept(tmp_path):
    """Of another machine: a seed that is repeated is replaced, one that was not complete is added.

    What suits the machine and does not change the result, such as the steps in a call, may differ.
    """
    study, runs = write_study(tmp_path)
    assert REPORT["main"]([str(study), str(runs)]) == 0
    config = dataclasses.replace(configuration("2_selective", epochs=2), steps_per_dispatch=7, devices=1)
    for seed, accuracy in ((0, 0.8), (7, 0.66)):
        directory = tmp_path / f"more/seed{seed}"
        write_run(directory, dataclasses.replace(config, seed=seed), accuracy, copies=60)
        environment = json.loads((directory / "environment.json").read_text())
        environment |= {"device": "faster", "images": {"sample": "abc"}}
        (directory / "environment.json").write_text(json.dumps(environment))
    assert REPORT["main"]([str(study), str(tmp_path / "more"), "--keep"]) == 0
    results = json.loads((study / "results.json").read_text())
    plain, selective = results["results"]
    assert [run["seed"] for run in plain["runs"]] == [0, 1, 2]
    accuracies = {run["seed"]: run["metrics"]["test_accuracy"][-1] for run in selective["runs"]}
    assert accuracies == {0: 0.8, 1: 0.7, 2: 0.62, 7: 0.66}
    devices = [results["environments"][run["environment"]]["device"] for run in selective["runs"]]
    assert devices == ["faster", "cpu", "cpu", "faster"]
    assert results["unfinished"] == []
    assert len(results["environments"]) == 2
    assert (study / "table.md").read_text().count("Machine:") == 2


def test_runs_of_other_settings_are_not_kept(tmp_path, capsys):
    study, runs = write_study(tmp_path)
    assert REPORT["main"]([str(study), str(runs)]) == 0
    before = (study / "results.json").read_text()
    for file in study.glob("*.toml"):
        file.write_text(file.read_text().replace("epochs = 2", "epochs = 1"))
    config = configuration("2_selective", epochs=1)
    write_run(tmp_path / "more/seed9", dataclasses.replace(config, seed=9), 0.5, epochs=1, copies=60)
    assert REPORT["main"]([str(study), str(tmp_path / "more"), "--keep"]) == 1
    assert "2_selective on fashion_mnist" in capsys.readouterr().err
    assert (study / "results.json").read_text() == before


def test_results_hold_every_epoch_of_every_run(made):
    results = json.loads((made / "results.json").read_text())
    plain, selective = results["results"]
    assert results["baseline"] == plain["configuration"] == "1_plain"
    assert [run["seed"] for run in selective["runs"]] == [0, 1, 2]
    assert selective["runs"][1]["metrics"]["test_accuracy"] == [0.9, 0.7]
    assert plain["runs"][0]["hours"] == pytest.approx(2.0, abs=0.01)
    assert plain["runs"][1]["hours"] is None
    assert len(results["environments"]) == 1
    assert selective["settings"]["allocation"]["threshold"] == 0.1


def test_table_and_picture_anew_from_the_results(made):
    names = ("results.json", "table.md", "accuracy.png")
    before = [(made / name).read_bytes() for name in names]
    (made / "table.md").unlink()
    assert REPORT["main"]([str(made)]) == 0
    assert [(made / name).read_bytes() for name in names] == before


def test_one_seed_claims_no_spread(tmp_path):
    study, runs = write_study(tmp_path)
    for seed in (1, 2):
        (runs / f"2_selective/seed{seed}/config.toml").unlink()
    REPORT["main"]([str(study), str(runs)])
    assert cells((study / "table.md").read_text(), "selective")[1:5] == ["0", "60.00", "+10.00", "-"]


def test_picture_names_every_curve_apart_from_the_others():
    """Nine curves that end close together."""
    rows = [
        {
            "data": "cifar10",
            "configuration": name,
            "name": name,
            "settings": {"allocation": {"until": 0.5}},
            "runs": [
                {"seed": s, "metrics": {"epoch": [1, 2], "test_accuracy": [0.1, 0.6 + 0.001 * i * s]}}
                for s in (1, 2)
            ],
        }
        for i, name in enumerate(NAMES)
    ]
    figure = PICTURE["accuracy_picture"]({"results": rows})
    figure.draw_without_rendering()
    (axes,) = figure.axes
    boxes = sorted((text.get_window_extent() for text in axes.texts), key=lambda box: box.y0)
    assert [text.get_text().split()[1] for text in axes.texts] == NAMES[::-1]
    assert all(below.y1 <= above.y0 + 1 for below, above in itertools.pairwise(boxes))
    assert all(box.x1 <= figure.bbox.x1 and box.y0 >= 0 and box.y1 <= figure.bbox.y1 for box in boxes)


def test_picture_of_runs_says_where_the_rounds_end_and_how_accurate_they_are(made):
    """From the runs: rounds until half of two epochs, in the selective network alone; digits of the table."""
    figure = PICTURE["accuracy_picture"](json.loads((made / "results.json").read_text()))
    (axes,) = figure.axes
    assert [text.get_text().strip() for text in axes.texts] == [
        "re-allocation ends",
        "64.00  selective",
        "52.00  plain 1x1",
    ]
    x, _ = axes.texts[0].get_position()
    assert x == 1.0
    assert any(list(line.get_xdata()) == [1.0, 1.0] for line in axes.lines)


@pytest.mark.parametrize(("until", "last"), [(0.5, 2), (0.2, 1), (1.0, 2)])
def test_rounds_end_after_a_whole_epoch_and_before_the_last(until, last):
    metrics = {"epoch": [1, 2, 3], "test_accuracy": [0.5, 0.6, 0.7], "deallocated": [4, 0, 0]}
    row = {"data": "cifar10", "configuration": "2_selective", "name": "selective"}
    row |= {"settings": {"allocation": {"until": until}}, "runs": [{"seed": 0, "metrics": metrics}]}
    (axes,) = PICTURE["accuracy_picture"]({"results": [row]}).axes
    assert axes.texts[0].get_position()[0] == last


def test_a_family_shares_its_colour():
    looks = PICTURE["_looks"](NAMES)
    assert len(set(looks.values())) == len(NAMES)
    assert looks["2_selective"][0] == looks["3_selective_fixed"][0] == looks["4_selective_unshifted"][0]
    assert looks["2_selective"][1] != looks["3_selective_fixed"][1]
    assert looks["5_shifted_third"][0] == looks["6_shifted_third_fixed"][0] != looks["2_selective"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("twice", "are runs of the same configuration, images and seed"),
        ("differ", "differ in more than their seed"),
        ("none", "no complete run of"),
        ("no study", "holds no configuration"),
        ("no results", "there is no .*results.json"),
    ],
)
def test_what_cannot_be_reported_is_one_line(tmp_path, capsys, change, message):
    study, runs = write_study(tmp_path)
    words = [str(study), str(runs)]
    config = configuration("1_plain", epochs=2)
    if change == "twice":
        write_run(runs / "again", config, 0.5)
    elif change == "differ":
        write_run(runs / "again", dataclasses.replace(config, seed=3, batch_size=64), 0.5)
    elif change == "none":
        words[1] = str(tmp_path / "nowhere")
    elif change == "no study":
        words[0] = str(runs)
    else:
        del words[1]
    assert REPORT["main"](words) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: ")
    assert re.search(message, error)
    assert not (study / "results.json").exists()


def test_looking_around_varies_what_its_readme_says():
    """Every configuration is the selective one but for these keys."""
    fixed = {"optimizer.train_shift": False}
    no_rounds = {"allocation.until": 0.0, "allocation.threshold": 1e-3, "allocation.compile_frozen": True}
    plain = {"model.variant": "plain", "allocation.threshold": 1e-3, "allocation.compile_frozen": True}
    third, every = ({"model.options": {"shifted": share}} | no_rounds for share in (0.33, 1.0))
    changes = {
        "1_plain": plain,
        "2_selective": {},
        "3_selective_fixed": fixed,
        "4_selective_unshifted": {"allocation.shift_range": 0.0} | fixed,
        "5_shifted_third": third,
        "6_shifted_third_fixed": third | fixed,
        "7_conv3x3": {"model.options": {"kernel_size": 3, "widths": [10, 11, 12]}} | plain,
        "8_shifted_all": every,
        "9_shifted_all_fixed": every | fixed,
    }
    assert list(changes) == NAMES
    base = configuration("2_selective", description="")
    assert (base.model.name, base.epochs, base.batch_size) == ("pointwise", 20, 128)
    assert base.data.validation == 5000
    assert (base.allocation.threshold, base.allocation.until) == (0.1, 0.5)
    for name, change in changes.items():
        expected = base
        for key, value in change.items():
            section, field = key.split(".")
            changed = dataclasses.replace(getattr(expected, section), **{field: value})
            expected = dataclasses.replace(expected, **{section: changed})
        assert configuration(name, description="") == expected, name
        rounds = expected.allocation.schedule.next_round(1, steps_per_epoch=429, epochs=20)
        assert (rounds is None) == ("allocation.until" in change)


def test_readme_of_looking_around_names_every_configuration():
    text = (LOOKING / "README.md").read_text()
    assert all(f"({name}.toml)" in text for name in NAMES)
    assert math.gcd(55_000 // 128, 45_000 // 128) == 39
