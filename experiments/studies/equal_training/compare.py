"""Compare the runs of this project with those of the authors' program: numbers, table and picture.

    python experiments/studies/equal_training/compare.py RUNS [RUNS ...]    collect these directories' runs
    python experiments/studies/equal_training/compare.py    table and picture again, from results.json

The other side's numbers are those of ``authors.json``, of every seed and epoch. The two sides have no random
numbers in common, so their seeds are no pairs: differences are those of two independent samples.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
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

AUTHORS, RESULTS, TABLE, PICTURE = "authors.json", "results.json", "table.md", "equal_training.png"
SIDES = ("this project", "authors' program")
_COLOURS = (INK, "#D55E00")

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


def curves(runs: Runs, quantity: str) -> NDArray[np.float64]:
    """Collect the values of a quantity, ``[seeds, epochs]``."""

    def column(key: str) -> NDArray[np.float64]:
        return np.array([run["metrics"][key] for run in runs], np.float64)

    if quantity == "accuracy":
        return 100 * column("test_accuracy")
    if quantity == "closed":
        return column("channels") - column("open_channels")
    return column("train_loss" if quantity == "loss" else quantity)


def compare(ours: Runs, authors: Runs) -> list[dict[str, Any]]:
    """Compute every tested difference of the two sides, with Welch's intervals.

    Args:
        ours: The runs of this project, with their metrics by name and epoch.
        authors: The runs of the authors' program.

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
        samples = [side[:, -1] if when == LAST else side.mean(axis=1) for side in sides]
        found = [spread(sample.tolist()) for sample in samples]
        joint = welch_interval(*samples, 1 - (1 - CONFIDENCE) / len(tests))
        rows.append(
            {
                "quantity": quantity,
                "when": when,
                "means": [side.mean for side in found],
                "deviations": [side.std for side in found],
                "difference": found[0].mean - found[1].mean,
                "interval": welch_interval(*samples, CONFIDENCE),
                "joint_interval": joint,
                "differs": not joint[0] <= 0 <= joint[1],
            }
        )
    return rows


def welch_interval(
    first: NDArray[np.float64], second: NDArray[np.float64], confidence: float
) -> tuple[float, float]:
    """Compute Welch's t-interval of the difference of two means, whose variances may differ."""
    errors = np.array([sample.var(ddof=1) / len(sample) for sample in (first, second)])
    difference = float(first.mean() - second.mean())
    if not errors.any():  # no variance: the difference is exact
        return difference, difference
    degrees = errors.sum() ** 2 / (errors**2 / (len(first) - 1, len(second) - 1)).sum()
    reach = float(stdtrit(degrees, (1 + confidence) / 2) * np.sqrt(errors.sum()))
    return difference - reach, difference + reach


def table(results: Mapping[str, Any], authors: Runs) -> str:
    """Format two Markdown tables: the tested differences, and both sides epoch by epoch."""
    ours = results["results"][0]["runs"]
    lines = [
        f"| quantity | of | {SIDES[0]} | {SIDES[1]} | difference | 95% interval | joint interval | differ? |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in results["comparison"]:
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
    notes = (
        f"Mean ± standard deviation over {len(ours)} seeds here and {len(authors)} there; {SIDES[0]} minus "
        f"{SIDES[1]}; Welch's intervals, by themselves and at the joint level of all rows (Bonferroni)."
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
    machines = [f"Machine: {report._machine(environment)}." for environment in results["environments"]]
    return "\n\n".join(["\n".join(lines), notes, "\n".join(epochs), *machines]) + "\n"


def _cell(values: NDArray[np.float64], decimals: int) -> str:
    return f"{values.mean():.{decimals}f} ± {values.std(ddof=1):.{decimals}f}"


@styled
def picture(results: Mapping[str, Any], authors: Runs) -> Figure:
    """Plot mean and standard deviation of both sides, a panel per quantity, and all intervals in one."""
    ours = results["results"][0]["runs"]
    figure = new_figure(11.5, 6.9)
    # Each row has its own layout: the names in the last panel take no room from the row above.
    panels = [axes for row in figure.subfigures(2, 1) for axes in row.subplots(1, 3)]
    frozen = results["results"][0]["settings"]["allocation"]["until"]
    for axes, quantity in zip(panels, QUANTITIES, strict=False):
        _draw_curves(axes, quantity, ours, authors, frozen)
    _draw_intervals(panels[5], results["comparison"])
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=2, loc="outside upper center", fontsize=10.5)
    return figure


def _draw_curves(axes: Axes, quantity: str, ours: Runs, authors: Runs, frozen: float) -> None:
    name, unit, _ = QUANTITIES[quantity]
    epochs = ours[0]["metrics"]["epoch"]
    for side, runs, colour, style in zip(SIDES, (ours, authors), _COLOURS, ("o-", "s--"), strict=True):
        values = curves(runs, quantity)
        mean, deviation = values.mean(axis=0), values.std(axis=0, ddof=1)
        label = f"{side}: mean and standard deviation of {len(runs)} seeds"
        axes.plot(epochs, mean, style, color=colour, ms=3.5, linewidth=1.6, label=label)
        axes.fill_between(epochs, mean - deviation, mean + deviation, color=colour, alpha=0.16, linewidth=0)
    axes.set(title=f"{name} ({unit})" if unit else name, xlabel="epoch")
    axes.axvline(frozen * epochs[-1], color=MUTED, linewidth=1.0, linestyle=(0, (2, 3)))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.grid(True, axis="y")
    axes.set_axisbelow(True)
    if quantity == "deallocated":
        place = axes.get_xaxis_transform()
        axes.text(frozen * epochs[-1], 0.96, "  last round", color=MUTED, transform=place, va="top")


def _draw_intervals(axes: Axes, comparison: Sequence[Mapping[str, Any]]) -> None:
    """Plot differences and intervals in standard deviations of a run, on one common scale."""
    short = {LAST: "last", AVERAGE: "average"}
    for place, row in enumerate(comparison):
        scale = float(np.sqrt(np.mean(np.square(row["deviations"])))) or 1.0
        for key, width in (("joint_interval", 1.2), ("interval", 3.4)):
            axes.plot(np.array(row[key]) / scale, [place, place], color=INK, linewidth=width)
        axes.plot(row["difference"] / scale, place, "o", color="white", mec=INK, ms=5.5, zorder=3)
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
        authors = _read(study / AUTHORS, "it holds the other side's numbers")["runs"]
        if options.runs:
            results = report.collect(study, options.runs)
        else:
            results = _read(study / RESULTS, "name the directories of our runs")
        _check(results["results"][0]["runs"], authors)
        results["comparison"] = compare(results["results"][0]["runs"], authors)
        (study / RESULTS).write_text(report._json(results), encoding="utf-8")
        (study / TABLE).write_text(table(results, authors), encoding="utf-8")
        save_figure(picture(results, authors), study / PICTURE)
    except SelconvError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(", ".join(str(study / name) for name in (RESULTS, TABLE, PICTURE)))
    return 0


def _read(file: Path, remedy: str) -> Any:
    if not file.is_file():
        raise DataError(f"there is no {file}: {remedy}.")
    return json.loads(file.read_text(encoding="utf-8"))


def _check(ours: Runs, authors: Runs) -> None:
    """Check that both sides have the same epochs, and enough seeds for a spread."""
    for side, runs in zip(SIDES, (ours, authors), strict=True):
        if len(runs) < 2:
            raise DataError(f"there is one run of {side}; a spread takes two seeds or more.")
    if len({tuple(run["metrics"]["epoch"]) for run in (*ours, *authors)}) > 1:
        raise DataError(f"the runs of {SIDES[0]} and of {SIDES[1]} differ in their epochs.")


if __name__ == "__main__":
    sys.exit(main())
