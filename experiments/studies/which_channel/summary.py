"""Summarize the study as ``results.json``, ``table.md`` and ``accuracy.png`` in its folder.

python experiments/studies/which_channel/summary.py WORKDIR    collect what run.py left in this directory
python experiments/studies/which_channel/summary.py            table and picture again, from results.json
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from criteria import CRITERIA, LIBRARY
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from selconv_jax.errors import SelconvError
from selconv_jax.report import paired_difference, save_figure, spread
from selconv_jax.report._style import INK, new_figure, styled

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from report import collect, machines  # of all studies

STUDY = Path(__file__).resolve().parent
RESULTS, TABLE, PICTURE = "results.json", "table.md", "accuracy.png"
_ALL = (*CRITERIA, *LIBRARY)
_COLOURS = dict(zip(_ALL, ("#D55E00", "#0072B2", "#009E73", INK, "#CC79A7", "#E69F00"), strict=True))
_AXES = {
    "share": "channels closed (%)",
    "parameters": "parameters removed (%)",
    "multiply_adds": "multiply-adds removed (%)",
}
_NAMES = {
    "densenet40": "DenseNet, three layers in each block",
    "preresnet164": "Pre-activation ResNet, two units in each block",
}
_TRAINED_ON = "_trained_on"

Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the three files; an error is one line."""
    parser = argparse.ArgumentParser(description="Turns the study's results into numbers, table and picture.")
    parser.add_argument("workdir", type=Path, nargs="?", help="directory given to run.py; none: results.json")
    options = parser.parse_args(arguments)
    try:
        if options.workdir:
            (STUDY / RESULTS).write_text(_json(collected(options.workdir)), encoding="utf-8")
        results = json.loads((STUDY / RESULTS).read_text(encoding="utf-8"))
    except (SelconvError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    (STUDY / TABLE).write_text(table(results), encoding="utf-8")
    save_figure(picture(results["criteria"]), STUDY / PICTURE)
    print(", ".join(str(STUDY / name) for name in (RESULTS, TABLE, PICTURE)))
    return 0


def collected(workdir: Path) -> dict[str, Any]:
    """Join what the training left, as in all studies, with the measurements of all criteria."""
    trained = collect(STUDY, [workdir / "trained"])
    rows = json.loads((workdir / RESULTS).read_text(encoding="utf-8"))
    order = {name: place for place, name in enumerate(_ALL)}
    rows.sort(key=lambda row: (row["network"], order[row["criterion"]], row["share"], row["seed"]))
    return {
        "study": trained["study"],
        "environments": trained["environments"],
        "trained": trained["results"],
        "criteria": rows,
    }


def table(results: dict[str, Any]) -> str:
    """Format Markdown tables for each network: accuracy, paired differences, what is left of the network."""
    rows = results["criteria"]
    parts = []
    for network in dict.fromkeys(row["network"] for row in rows):
        parts += _tables(network, [row for row in rows if row["network"] == network])
    seeds = sorted({row["seed"] for row in rows})
    parts.append(
        f"Seeds {', '.join(map(str, seeds))}: mean ± standard deviation; differences are paired by seed, "
        "with Student's 95% interval of their mean. Fractions are of all channels that layers read; those "
        "of Torch-Pruning, of the channels that convolutions make. Sizes are means over the seeds."
    )
    parts += machines(results)
    libraries = {(row["network"], json.dumps(row["versions"])) for row in rows if "versions" in row}
    for network, versions in sorted(libraries):
        named = ", ".join(f"{name} {version}" for name, version in json.loads(versions).items())
        parts.append(f"Torch-Pruning's rows, {_NAMES.get(network, network).partition(',')[0]}: {named}.")
    hours = [run["hours"] for row in results["trained"] for run in row["runs"]]
    if None not in hours:
        parts.append(f"Training the {len(hours)} networks took {sum(hours):.1f} hours.")
    return "\n\n".join(parts) + "\n"


def _tables(network: str, rows: Sequence[Row]) -> list[str]:
    """Format the tables of one network, and the lines between them."""
    whole = [row for row in rows if not row["share"]]
    criteria = [criterion for criterion in _ALL if _select(rows, criterion, None)]

    def difference(group: Sequence[Row], share: float, key: str) -> str:
        return _difference(_select(rows, _ALL[0], share), group, key)

    return [
        f"### {_NAMES.get(network, network)}",
        f"Nothing closed: test accuracy {_accuracy(whole, 'test_accuracy')}%; parameters and multiply-adds "
        f"{_sizes(whole)}.",
        "Test accuracy (%):",
        _grid(rows, criteria, lambda group, _, key: _accuracy(group, key)),
        f"{_ALL[0].capitalize()} minus another criterion, in percentage points:",
        _grid(rows, [criterion for criterion in CRITERIA[1:] if criterion in criteria], difference),
        "What is left of the network, parameters and multiply-adds:",
        _grid(rows, criteria, lambda group, *_: _sizes(group), trained_on=False),
    ]


def _grid(
    rows: Sequence[Row],
    criteria: Sequence[str],
    cell: Callable[[list[Row], float, str], str],
    trained_on: bool = True,
) -> str:
    """Format a table: a line per closed fraction, without and with training on, a column per criterion."""
    lines = [f"| closed | {' | '.join(criteria)} |", "|---" * (len(criteria) + 1) + "|"]
    for suffix in ("", _TRAINED_ON) if trained_on else ("",):
        key = f"test_accuracy{suffix}"
        for share in sorted({row["share"] for row in rows if row["share"] and key in row}):
            groups = [
                [row for row in _select(rows, criterion, share) if key in row] for criterion in criteria
            ]
            cells = [cell(group, share, key) if group else "-" for group in groups]
            lines.append(f"| {share:.0%}{', trained on' if suffix else ''} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _difference(group: Sequence[Row], others: Sequence[Row], key: str) -> str:
    ours, theirs = ({row["seed"]: 100 * row[key] for row in rows if key in row} for rows in (group, others))
    if not ours.keys() & theirs.keys():
        return "-"
    paired = paired_difference(ours, theirs)
    interval = "" if paired.interval is None else " ({:+.1f} to {:+.1f})".format(*paired.interval)
    return f"{paired.mean:+.1f}{interval}"


def _accuracy(rows: Sequence[Row], key: str) -> str:
    found = spread([100 * row[key] for row in rows])
    return f"{found.mean:.1f}" + ("" if found.std is None else f" ± {found.std:.1f}")


def _sizes(rows: Sequence[Row]) -> str:
    parameters, multiply_adds = (
        float(np.mean([row[key] for row in rows])) for key in ("parameters", "multiply_adds")
    )
    return f"{parameters:,.0f}; {multiply_adds / 1e6:.2f} M"


@styled
def picture(rows: Sequence[Row]) -> Figure:
    """Plot test accuracy against the removed fraction: panels per network, a curve per criterion.

    Points are means over the seeds, bars standard deviations; open ones follow after training on.
    """
    networks = list(dict.fromkeys(row["network"] for row in rows if not row["share"]))
    figure = new_figure(11.0, 0.6 + 3.3 * len(networks))
    grid = figure.subplots(len(networks), len(_AXES), squeeze=False, sharey="row")
    for network, panels in zip(networks, grid, strict=True):
        for (key, label), axes in zip(_AXES.items(), panels, strict=True):
            _draw(axes, [row for row in rows if row["network"] == network], key)
            axes.set(xlabel=label)
        panels[0].set_title(_NAMES.get(network, network))
        panels[0].set_ylabel("test accuracy (%)")
    handles, labels = grid[0, -1].get_legend_handles_labels()
    handles.append(Line2D([], [], color=INK, marker="o", mfc="none", ms=4, linestyle="none"))
    labels.append("trained on for two epochs")
    figure.legend(handles, labels, ncols=(len(labels) + 1) // 2, loc="outside lower center")
    return figure


def _draw(axes: Axes, rows: Sequence[Row], key: str) -> None:
    whole = [row for row in rows if not row["share"]]
    # A library's share is of the channels that convolutions make, not of those that they read.
    for criterion in CRITERIA if key == "share" else _ALL:
        own = [row for row in rows if row["criterion"] == criterion and row["share"]]
        for suffix, style in (("", "o-"), (_TRAINED_ON, "o")):
            groups = [
                [row for row in [*whole, *own] if row["share"] == share and f"test_accuracy{suffix}" in row]
                for share in sorted({row["share"] for row in [*whole, *own]})
            ]
            points = [_point(group, whole, key, suffix) for group in groups if group]
            if own and points:
                x, y, deviation = zip(*points, strict=True)
                label = None if suffix else criterion
                face = "none" if suffix else _COLOURS[criterion]
                axes.errorbar(
                    x, y, deviation, fmt=style, color=_COLOURS[criterion], mfc=face, ms=4, label=label
                )


def _point(group: Sequence[Row], whole: Sequence[Row], key: str, suffix: str) -> tuple[float, float, float]:
    """Compute removed fraction, mean accuracy and standard deviation over the seeds, all in per cent."""
    found = spread([100 * row[f"test_accuracy{suffix}"] for row in group])
    kept = float(np.mean([row[key] for row in group]))
    removed = kept if key == "share" else 1 - kept / whole[0][key]
    return 100 * removed, found.mean, found.std or 0.0


def _select(rows: Sequence[Row], criterion: str, share: float | None) -> list[Row]:
    """Return the rows of a criterion, at one fraction or at all but 0."""
    return [
        row
        for row in rows
        if row["criterion"] == criterion and row["share"] and share in (None, row["share"])
    ]


def _json(results: dict[str, Any]) -> str:
    """Write JSON with one row per line, which suits line-based diffs."""
    rows = ",\n".join(json.dumps(row) for row in results["criteria"])
    head = json.dumps({key: value for key, value in results.items() if key != "criteria"})[:-1]
    return f'{head},\n"criteria": [\n{rows}\n]}}\n'


if __name__ == "__main__":
    sys.exit(main())
