"""Plot the results of the study, and print its table.

python experiments/studies/which_channel/picture.py RESULTS PICTURE
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from criteria import CRITERIA, LIBRARY
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selconv_jax.report import save_figure, spread
from selconv_jax.report._style import INK, new_figure, styled

_ALL = (*CRITERIA, *LIBRARY)
_COLOURS = dict(zip(_ALL, ("#D55E00", "#0072B2", "#009E73", INK, "#CC79A7", "#E69F00"), strict=True))
_AXES = {
    "share": "channels closed (%)",
    "parameters": "parameters removed (%)",
    "multiply_adds": "multiply-adds removed (%)",
}

Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the picture and the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args(arguments)
    rows = json.loads(options.results.read_text(encoding="utf-8"))
    save_figure(picture(rows), options.picture)
    print(table(rows))
    return 0


def table(rows: Sequence[Row]) -> str:
    """Format a Markdown table: mean and standard deviation over the seeds of test accuracy in per cent."""
    lines = [
        "| network | closed | by | seeds | test accuracy (%) | trained on | parameters | multiply-adds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    keys = list(dict.fromkeys((row["network"], row["share"], row["criterion"]) for row in rows))
    for network, share, criterion in sorted(keys, key=lambda key: (*key[:2], _ALL.index(key[2]))):
        group = _of(rows, network, criterion, share)
        cells = [
            network,
            f"{share:.0%}",
            criterion if share else "",
            str(len(group)),
            _percent([row["test_accuracy"] for row in group]),
            _percent([row["test_accuracy_trained_on"] for row in group if "test_accuracy_trained_on" in row]),
            *(f"{np.mean([row[key] for row in group]):,.0f}" for key in ("parameters", "multiply_adds")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


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
            axes.set(xlabel=label, title=network)
        panels[0].set_ylabel("test accuracy (%)")
    handles, labels = grid[0, -1].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=(len(labels) + 1) // 2, loc="outside lower center")
    return figure


def _draw(axes: Axes, rows: Sequence[Row], key: str) -> None:
    whole = [row for row in rows if not row["share"]]
    # A library's share is of the channels that convolutions make, not of those that they read.
    for criterion in CRITERIA if key == "share" else _ALL:
        own = [row for row in rows if row["criterion"] == criterion and row["share"]]
        for suffix, style in (("", "o-"), ("_trained_on", "o")):
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


def _of(rows: Sequence[Row], network: str, criterion: str, share: float) -> list[Row]:
    key = (network, criterion, share)
    return [row for row in rows if (row["network"], row["criterion"], row["share"]) == key]


def _percent(values: Sequence[float]) -> str:
    if not values:
        return ""
    found = spread([100 * value for value in values])
    return f"{found.mean:.2f}" + (f" ± {found.std:.2f}" if len(values) > 1 else "")


if __name__ == "__main__":
    sys.exit(main())
