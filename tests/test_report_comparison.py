"""Comparison of configurations: mean and spread by hand, and what is drawn equals them."""

import io

import numpy as np
import pytest
from rich.console import Console

from selconv_jax.errors import SelconvError
from selconv_jax.report._comparison import (
    ConfigurationResults,
    comparison_table,
    difference_table,
    number_differences,
    run_numbers,
)
from selconv_jax.report._comparison_picture import comparison_picture
from selconv_jax.report._statistics import PairedDifference, Spread


def run(*accuracies: float, closed: int = 2, speed: float | None = 1000.0) -> list[dict[str, float | None]]:
    return [
        {
            "epoch": epoch,
            "train_loss": 1.0 / epoch,
            "test_loss": 2.0 / epoch,
            "test_accuracy": accuracy,
            "validation_accuracy": 1 - accuracy,
            "deallocated": closed,
            "reallocated": closed - 1,
            "open_channels": 9,
            "copies": 3,
            "channels": 10,
            "images_per_second": None if speed is None else speed * epoch,
        }
        for epoch, accuracy in enumerate(accuracies, start=1)
    ]


PLAIN = ConfigurationResults("plain", {0: run(0.5, 0.75, 0.625), 4: run(0.5, 0.5, 0.75)})
SELECTIVE = ConfigurationResults("selective [x]", {0: run(0.5, 0.875, 0.75)})


def text_of(table, width=80) -> str:
    text = io.StringIO()
    Console(file=text, width=width).print(table)
    return text.getvalue()


def test_numbers_of_a_run():
    assert run_numbers(PLAIN.runs[0]) == {
        "test_accuracy": 0.625,
        "test_error": 0.375,
        "test_loss": pytest.approx(2 / 3),
        "train_loss": pytest.approx(1 / 3),
        "validation_accuracy": 0.375,
        "best_test_accuracy": 0.5,  # at the best epoch by validation accuracy
        "best_epoch": 1.0,
        "deallocated": 6.0,
        "reallocated": 3.0,
        "copies": 3.0,
        "open_channels": 9.0,
        "channels": 10.0,
        "images_per_second": 2000.0,
    }


def test_missing_numbers_are_none():
    numbers = run_numbers([{"epoch": 1, "test_accuracy": 0.5, "images_per_second": None}])
    assert numbers["test_error"] == 0.5
    assert numbers["images_per_second"] is None
    assert numbers["deallocated"] is None
    with pytest.raises(SelconvError, match="no finished epoch"):
        run_numbers([])


def test_summary_over_seeds():
    summary = PLAIN.summary
    assert summary["test_accuracy"] == Spread(0.6875, pytest.approx(0.125 / 2**0.5), 2)
    assert summary["test_error"].mean == 0.3125
    assert summary["best_test_accuracy"] == Spread(0.5, 0.0, 2)
    partly = ConfigurationResults("partly", {0: run(0.5), 1: run(0.5, speed=None)})
    assert partly.summary["images_per_second"] == Spread(1000.0, None, 1)
    with pytest.raises(SelconvError, match="plain has no finished run"):
        ConfigurationResults("plain", {})


def test_table_shows_mean_and_deviation():
    text = text_of(comparison_table([PLAIN, SELECTIVE]))
    assert "seeds 0, 4" in text
    assert "selective [x]" in text  # no markup
    first, deviations = (
        next(line for line in text.splitlines() if line.startswith(f" {start}"))
        for start in ("plain", "seeds")
    )
    assert first.split() == ["plain", "68.75", "31.25", "50.00", "6.0", "3.0", "2,000"]
    assert deviations.split("4", 1)[1].replace("±", "").split() == ["8.84", "8.84", "0.00", "0.0", "0.0", "0"]
    single = next(line for line in text.splitlines() if "seed 0" in line)
    assert single.split() == ["seed", "0", *"------"]
    assert max(map(len, text.splitlines())) <= 80
    assert "best: the epoch of the highest validation accuracy" in text
    without = text_of(
        comparison_table([ConfigurationResults("plain", {0: [{"epoch": 1, "test_accuracy": 0.5}]})])
    )
    assert "best" not in without


def test_failed_seeds_are_marked():
    some = ConfigurationResults("some", PLAIN.runs, failed=[7])
    none = ConfigurationResults("none", {}, failed=[0, 4])
    assert some.summary == PLAIN.summary
    assert none.summary == {}
    text = text_of(comparison_table([some, none]))
    assert "seeds 0, 4; failed: seed 7" in " ".join(text.split())
    assert "failed: seeds 0, 4" in " ".join(text.split())


EQUAL = ConfigurationResults("equal", {seed: run(0.5, 0.75 + seed / 32) for seed in (0, 4, 5)})
BETTER = ConfigurationResults("better [x]", {0: run(0.5, 0.75), 4: run(0.5, 0.875 - 1 / 1024)})
WORSE = ConfigurationResults("worse", {0: run(0.625), 4: run(0.75 - 1 / 1024)})


def test_differences_are_paired_by_seed():
    differences = number_differences(EQUAL, PLAIN)
    # Errors 0.25, 0.125 against 0.375, 0.25.
    assert differences["test_error"] == PairedDifference(-0.125, 0.0, None, 2)
    assert number_differences(BETTER, PLAIN)["test_error"].excludes_zero
    assert differences["deallocated"].mean == -2.0  # of one epoch less
    one = ConfigurationResults("one", {0: [{"epoch": 1, "test_accuracy": 0.5}]})
    assert {"test_accuracy", "test_error"} <= set(number_differences(PLAIN, one))
    assert "deallocated" not in number_differences(PLAIN, one)
    assert number_differences(one, ConfigurationResults("other", {1: run(0.5)})) == {}


def test_difference_table_marks_what_is_larger_than_chance():
    text = text_of(difference_table([PLAIN, BETTER, WORSE, SELECTIVE, EQUAL]))
    assert max(map(len, text.splitlines())) <= 80
    rows = {line.split("  ")[0].strip(): line.split() for line in text.splitlines()}
    # Differences -1/8 and -1/8 + 1/1024.
    assert rows["better [x]"][2:] == ["-12.45", "0.05", "-13.07", "to", "-11.83", "*", "2"]
    # Differences 0 and 1/1024: mean and standard error 0.049 points, t of one degree of freedom 12.706.
    assert rows["worse"][1:] == ["+0.05", "0.05", "-0.57", "to", "+0.67", "2"]
    assert rows["selective [x]"][2:] == ["-12.50", "-", "-", "1"]  # of one seed nothing is claimed
    assert rows["equal"][1:] == ["-12.50", "0.00", "-", "2"]
    assert "minus that of plain" in text
    assert "* The interval excludes 0." in " ".join(text.split())
    text = " ".join(text_of(difference_table([PLAIN, WORSE])).split())
    assert "no difference is larger than chance explains" in text
    text = " ".join(text_of(difference_table([PLAIN, SELECTIVE])).split())
    assert "Of a single pair nothing can be said" in text


def test_difference_table_says_why_there_is_no_interval():
    text = " ".join(text_of(difference_table([PLAIN, EQUAL])).split())
    assert "paired by seed. Where all pairs differ by the same, there is no interval" in text
    other = ConfigurationResults("other", {7: run(0.5)})
    text = " ".join(text_of(difference_table([PLAIN, other])).split())
    assert "There are no pairs: no seed is common." in text
    assert "single pair" not in text


def test_picture_marks_what_is_larger_than_chance():
    finals = comparison_picture([PLAIN, BETTER, WORSE], "title").axes[1]
    assert [text.get_text().endswith(" *") for text in finals.texts] == [False, True, False]
    assert "* other than the first row" in finals.get_xlabel().replace(":", "")
    assert "*" not in comparison_picture([PLAIN, WORSE], "title").axes[1].get_xlabel()


def test_picture_draws_what_the_runs_logged():
    curves, finals = comparison_picture([PLAIN, SELECTIVE], "title").axes
    mean, single = curves.get_lines()
    np.testing.assert_allclose(mean.get_xydata(), [[1, 50], [2, 37.5], [3, 31.25]])
    np.testing.assert_allclose(single.get_ydata(), [50, 12.5, 25])
    (band,) = curves.collections  # one seed has none
    low, high = band.get_paths()[0].get_extents().intervaly
    deviation = 25 / 2**0.5  # of 25 and 50, after the second epoch
    assert (low, high) == (pytest.approx(37.5 - deviation), pytest.approx(37.5 + deviation))
    assert [label.get_text() for label in finals.get_yticklabels()] == ["plain", "selective [x]"]
    points = [line.get_xdata() for line in finals.get_lines() if line.get_marker() == "o"]
    np.testing.assert_allclose(points[0], [37.5, 25])
    np.testing.assert_allclose(points[1], [25])
    assert [text.get_text() for text in finals.texts] == ["31.25 ± 8.84", "25.00"]
    assert curves.get_yscale() == "linear"


def test_picture_of_runs_of_other_lengths_and_gaps():
    short = ConfigurationResults("short", {0: run(0.5, 0.95), 1: run(0.5, 0.95, 0.98)})
    curves, finals = comparison_picture([short], "title").axes
    np.testing.assert_allclose(curves.get_lines()[0].get_ydata(), [50, 5, np.nan])
    assert curves.get_yscale() == "log"  # from 5 to 50 %
    assert finals.texts[0].get_text() == "3.50 ± 2.12"
    records = run(0.5, 0.6, 0.7, 0.8)
    lost = ConfigurationResults("lost", {seed: [records[0], *records[3:]] for seed in (0, 1)})
    (line,) = comparison_picture([lost], "title").axes[0].get_lines()
    np.testing.assert_allclose(line.get_xydata(), [[1, 50], [2, np.nan], [3, np.nan], [4, 20]])
    nothing = ConfigurationResults("nothing", {0: [{"epoch": 1}]})
    assert not comparison_picture([nothing], "title").axes[1].texts
    with pytest.raises(SelconvError, match="no finished run"):
        comparison_picture([], "title")
