"""Compare the runs of this project with those of the authors' program: numbers, table and picture.

    python experiments/studies/equal_training/compare.py RUNS [RUNS ...]    collect these directories' runs
    python experiments/studies/equal_training/compare.py    table and picture again, from results.json

The other side's numbers, of every seed and epoch, are those of ``authors.json``, whose runs have no random
numbers in common with ours: differences are those of two independent samples. And those of
``authors_same_start.json``, which start from the initial values of our seeds: differences are paired by seed.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from scipy.special import stdtrit

from selconv_jax.errors import DataError, SelconvError
from selconv_jax.report import save_figure, spread
from selconv_jax.report._style import INK, MUTED, new_figure, styled

STUDY = Path(__file__).resolve().parent
sys.path.insert(0, str(STUDY.parent))
import report  # noqa: E402 - it lies in the folder of all studies

AUTHORS, SAME_START = "authors.json", "authors_same_start.json"
RESULTS, TABLE, PICTURE = "results.json", "table.md", "equal_training.png"
SIDES = ("this project", "authors' program")
_COLOURS = (INK, "#D55E00", "#0072B2")  # the last: the other side from our initial values

# Name, unit and decimals of the compared quantities, in the order of the table.
QUANTITIES = {
    "accuracy": ("test accuracy", "%", 2),
    "loss": ("training loss", "", 3),
    "deallocated": ("channels de-allocated in the epoch", "", 1),
    "closed": ("channels closed after the epoch", "", 1),
    "copies": ("channels that are copies", "", 1),
}
LAST, AVERAGE = "last epoch", "average of the epochs"
CONFIDENCE = 0.95

Runs = Sequence[Mapping[str, Any]]
Samples = NDArray[np.float64]
Interval = Callable[[Samples, Samples, float], tuple[float, float]]


def curves(runs: Runs, quantity: str) -> NDArray[np.float64]:
    """Collect the values of a quantity, ``[seeds, epochs]``."""

    def column(key: str) -> NDArray[np.float64]:
        return np.array([run["metrics"][key] for run in runs], np.float64)

    if quantity == "accuracy":
        return 100 * column("test_accuracy")
    if quantity == "closed":
        return column("channels") - column("open_channels")
    return column("train_loss" if quantity == "loss" else quantity)


def welch_interval(first: Samples, second: Samples, confidence: float) -> tuple[float, float]:
    """Compute Welch's t-interval of the difference of two means, whose variances may differ."""
    errors = np.array([sample.var(ddof=1) / len(sample) for sample in (first, second)])
    difference = float(first.mean() - second.mean())
    if not errors.any():  # no variance: the difference is exact
        return difference, difference
    degrees = errors.sum() ** 2 / (errors**2 / (len(first) - 1, len(second) - 1)).sum()
    reach = float(stdtrit(degrees, (1 + confidence) / 2) * np.sqrt(errors.sum()))
    return difference - reach, difference + reach


def paired_interval(first: Samples, second: Samples, confidence: float) -> tuple[float, float]:
    """Compute Student's t-interval of the mean difference of two samples whose elements are pairs."""
    differences = first - second
    error = differences.std(ddof=1) / np.sqrt(len(differences))
    reach = float(stdtrit(len(differences) - 1, (1 + confidence) / 2) * error)
    return float(differences.mean()) - reach, float(differences.mean()) + reach


def compare(ours: Runs, authors: Runs, find_interval: Interval = welch_interval) -> list[dict[str, Any]]:
    """Compute every tested difference of the two sides, with its intervals.

    Args:
        ours: The runs of this project, with their metrics by name and epoch.
        authors: The runs of the authors' program.
        find_interval: Takes a value of every run of either side, and the confidence.

    Returns:
        For each quantity, at the last epoch and as the average of the epochs: mean and standard deviation
            of both sides, the difference, its interval by itself and at the joint level of all of them
            (Bonferroni), and whether the latter excludes 0.
    """
    tests = [
        (quantity, when)
        for quantity in QUANTITIES
        for when in (LAST, AVERAGE)
        if (quantity, when) != ("deallocated", LAST)  # there is no round
    ]
    rows = []
    for quantity, when in tests:
        sides = [curves(runs, quantity) for runs in (ours, authors)]
        here, there = (side[:, -1] if when == LAST else side.mean(axis=1) for side in sides)
        found = [spread(sample.tolist()) for sample in (here, there)]
        joint = find_interval(here, there, 1 - (1 - CONFIDENCE) / len(tests))
        rows.append(
            {
                "quantity": quantity,
                "when": when,
                "means": [side.mean for side in found],
                "deviations": [side.std for side in found],
                "difference": found[0].mean - found[1].mean,
                "interval": find_interval(here, there, CONFIDENCE),
                "joint_interval": joint,
                "differs": not joint[0] <= 0 <= joint[1],
            }
        )
    return rows


def table(results: Mapping[str, Any], authors: Runs) -> str:
    """Format the tested differences of both comparisons, and both sides epoch by epoch, as Markdown."""
    ours = results["results"][0]["runs"]
    start = (
        f"Mean ± standard deviation over {len(ours)} seeds here and {len(authors)} there; {SIDES[0]} minus "
        f"{SIDES[1]}; Welch's intervals, by themselves and at the joint level of all rows (Bonferroni)."
    )
    paired = (
        "The other side from the initial values of the seeds here; differences and Student's intervals are "
        "paired by seed."
    )
    heads = ("accuracy (%)", "loss", "de-allocated", "closed", "copies")
    columns = [f"{head}, {side}" for head in heads for side in ("here", "there")]
    epochs = [f"| epoch | {' | '.join(columns)} |", f"| {' | '.join(['---'] * (len(columns) + 1))} |"]
    for number, epoch in enumerate(ours[0]["metrics"]["epoch"]):
        cells = [
            _cell(curves(runs, key)[:, number], QUANTITIES[key][2])
            for key in QUANTITIES
            for runs in (ours, authors)
        ]
        epochs.append(f"| {epoch} | {' | '.join(cells)} |")
    parts = [_differences(results["comparison"]), start, _differences(results["same_start"]), paired]
    return "\n\n".join([*parts, "\n".join(epochs), *report.machines(results)]) + "\n"


def _differences(comparison: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        f"| quantity | of | {SIDES[0]} | {SIDES[1]} | difference | 95% interval | joint interval | differ? |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in comparison:
        name, unit, decimals = QUANTITIES[row["quantity"]]
        sides = zip(row["means"], row["deviations"], strict=True)
        cells = [
            f"{name} ({unit})" if unit else name,
            row["when"],
            *(f"{mean:.{decimals}f} ± {deviation:.{decimals}f}" for mean, deviation in sides),
            f"{row['difference']:+.{decimals}f}",
            *(
                f"{row[key][0]:+.{decimals}f} to {row[key][1]:+.{decimals}f}"
                for key in ("interval", "joint_interval")
            ),
            "**yes**" if row["differs"] else "no",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: NDArray[np.float64], decimals: int) -> str:
    return f"{values.mean():.{decimals}f} ± {values.std(ddof=1):.{decimals}f}"


@styled
def picture(results: Mapping[str, Any], authors: Runs, same_start: Runs) -> Figure:
    """Plot mean and standard deviation of both sides, a panel per quantity, and all intervals in one."""
    ours = results["results"][0]["runs"]
    figure = new_figure(11.5, 6.9)
    # Each row has its own layout: the names in the last panel take no room from the row above.
    rows: Any = figure.subfigures(2, 1)  # an array
    panels = [axes for row in rows for axes in row.subplots(1, 3)]
    frozen = results["results"][0]["settings"]["allocation"]["until"]
    for axes, quantity in zip(panels, QUANTITIES, strict=False):
        _draw_curves(axes, quantity, (ours, authors, same_start), frozen)
    _draw_intervals(panels[5], results["comparison"], results["same_start"])
    handles, labels = panels[0].get_legend_handles_labels()
    title = f"Mean and standard deviation of {len(ours)} seeds"
    figure.legend(handles, labels, ncols=3, loc="outside upper center", fontsize=10.5, title=title)
    return figure


def _draw_curves(axes: Axes, quantity: str, sides: Sequence[Runs], frozen: float) -> None:
    name, unit, _ = QUANTITIES[quantity]
    epochs = sides[0][0]["metrics"]["epoch"]
    names = (*SIDES, f"{SIDES[1]} from our initial values (mean alone)")
    for side, runs, colour, style in zip(names, sides, _COLOURS, ("o-", "s--", ":"), strict=True):
        values = curves(runs, quantity)
        mean, deviation = values.mean(axis=0), values.std(axis=0, ddof=1)
        axes.plot(epochs, mean, style, color=colour, ms=3.5, linewidth=1.6, label=side)
        if runs is not sides[2]:
            axes.fill_between(
                epochs, mean - deviation, mean + deviation, color=colour, alpha=0.16, linewidth=0
            )
    axes.set(title=f"{name} ({unit})" if unit else name, xlabel="epoch")
    axes.axvline(frozen * epochs[-1], color=MUTED, linewidth=1.0, linestyle=(0, (2, 3)))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.grid(True, axis="y")
    axes.set_axisbelow(True)
    if quantity == "deallocated":
        place = axes.get_xaxis_transform()
        axes.text(frozen * epochs[-1], 0.96, "  last round", color=MUTED, transform=place, va="top")


def _draw_intervals(
    axes: Axes, comparison: Sequence[Mapping[str, Any]], paired: Sequence[Mapping[str, Any]]
) -> None:
    """Plot differences and intervals in standard deviations of a run, on one common scale."""
    short = {LAST: "last", AVERAGE: "average"}
    for place, rows in enumerate(zip(comparison, paired, strict=True)):
        # That of the independent runs for both.
        scale = float(np.sqrt(np.mean(np.square(rows[0]["deviations"])))) or 1.0
        for row, shift, colour in zip(rows, (-0.19, 0.19), _COLOURS[1:], strict=True):
            for key, width in (("joint_interval", 1.0), ("interval", 2.8)):
                axes.plot(np.array(row[key]) / scale, [place + shift] * 2, color=colour, linewidth=width)
            axes.plot(
                row["difference"] / scale, place + shift, "o", color="white", mec=colour, ms=4.5, zorder=3
            )
    axes.axvline(0, color=MUTED, linewidth=1.0)
    names = {"deallocated": "de-allocated", "loss": "training loss"}
    labels = [f"{names.get(row['quantity'], row['quantity'])}, {short[row['when']]}" for row in comparison]
    axes.set_yticks(range(len(comparison)), labels)
    axes.invert_yaxis()
    reach = max(abs(limit) for limit in axes.get_xlim())
    axes.set_xlim(-reach, reach)
    axes.set_title("differences; 95% (thick), joint (thin)")
    axes.set_xlabel("here minus there, in standard deviations of a run")
    axes.grid(True, axis="x")
    axes.set_axisbelow(True)


def main(words: Sequence[str] | None = None) -> int:
    """Write the three files; an error is one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("runs", type=Path, nargs="*", help="directories of our runs; none: results.json")
    parser.add_argument("--study", type=Path, default=STUDY, help="folder of the study")
    options = parser.parse_args(words)
    study = options.study
    try:
        sides = [_read(study / name, "it holds the other side's numbers") for name in (AUTHORS, SAME_START)]
        authors, same_start = (side["runs"] for side in sides)
        if options.runs:
            results = report.collect(study, options.runs)
        else:
            results = _read(study / RESULTS, "name the directories of our runs")
        ours = results["results"][0]["runs"]
        _check(ours, authors)
        _check(ours, same_start, paired=True)
        results["comparison"] = compare(ours, authors)
        results["same_start"] = compare(ours, same_start, paired_interval)
        (study / RESULTS).write_text(report.as_json(results), encoding="utf-8")
        (study / TABLE).write_text(table(results, authors), encoding="utf-8")
        save_figure(picture(results, authors, same_start), study / PICTURE)
    except SelconvError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(", ".join(str(study / name) for name in (RESULTS, TABLE, PICTURE)))
    return 0


def _read(file: Path, remedy: str) -> Any:
    if not file.is_file():
        raise DataError(f"there is no {file}: {remedy}.")
    return json.loads(file.read_text(encoding="utf-8"))


def _check(ours: Runs, authors: Runs, *, paired: bool = False) -> None:
    """Check that both sides have the same epochs and enough seeds, and the same seeds if they are pairs."""
    for side, runs in zip(SIDES, (ours, authors), strict=True):
        if len(runs) < 2:
            raise DataError(f"there is one run of {side}; a spread takes two seeds or more.")
    if len({tuple(run["metrics"]["epoch"]) for run in (*ours, *authors)}) > 1:
        raise DataError(f"the runs of {SIDES[0]} and of {SIDES[1]} differ in their epochs.")
    if paired and [run["seed"] for run in ours] != [run["seed"] for run in authors]:
        raise DataError(f"{SAME_START} has other seeds than the runs of {SIDES[0]}: each needs its pair.")


if __name__ == "__main__":
    sys.exit(main())
