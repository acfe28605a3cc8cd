"""Plot of a study's test accuracy over the epochs."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from selconv_jax.report._style import INK, MUTED, new_figure, styled

__all__ = ["TITLES", "accuracy_picture", "by_data_set"]

TITLES = {
    "fashion_mnist_sample": "2,000 images of Fashion-MNIST",
    "fashion_mnist": "Fashion-MNIST",
    "cifar10": "CIFAR-10",
}

_COLOURS = (INK, "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito
_STYLES = ("-", "--", ":", "-.")


def by_data_set(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Group the rows of ``results.json`` by data set, in their order."""
    by_data: dict[str, list[dict[str, Any]]] = {}
    for row in results["results"]:
        by_data.setdefault(row["data"], []).append(row)
    return by_data


@styled
def accuracy_picture(results: dict[str, Any]) -> Figure:
    """Plot the mean over the seeds with a band of one standard deviation, a panel per data set.

    Args:
        results: The content of ``results.json``.

    Returns:
        The figure; every curve has its name and last value at its end.
    """
    by_data = by_data_set(results)
    looks = _looks([row["configuration"] for row in results["results"]])
    figure = new_figure(8.6, 0.4 + 3.7 * len(by_data))
    panels = figure.subplots(len(by_data), 1, squeeze=False)[:, 0]
    for axes, (data, rows) in zip(panels, by_data.items(), strict=True):
        _draw_panel(axes, data, rows, looks)
    panels[-1].set_xlabel("epoch", fontsize=11)
    return figure


def _looks(configurations: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Choose colours and line styles; a configuration whose name extends another's shares its colour.

    ``3_selective_fixed`` extends ``2_selective``; the number is the position in the order.
    """
    families: dict[str, list[str]] = {}
    for configuration in sorted(set(configurations)):
        name = configuration.partition("_")[2] or configuration
        family = next((known for known in families if name.startswith(f"{known}_")), name)
        families.setdefault(family, []).append(configuration)
    return {
        configuration: (_COLOURS[number % len(_COLOURS)], _STYLES[place % len(_STYLES)])
        for number, members in enumerate(families.values())
        for place, configuration in enumerate(members)
    }


def _draw_panel(
    axes: Axes, data: str, rows: Sequence[dict[str, Any]], looks: dict[str, tuple[str, str]]
) -> None:
    ends, means = [], []
    for row in rows:
        colour, style = looks[row["configuration"]]
        accuracy = 100 * np.array([run["metrics"]["test_accuracy"] for run in row["runs"]], np.float64)
        epochs, mean = row["runs"][0]["metrics"]["epoch"], accuracy.mean(axis=0)
        axes.plot(epochs, mean, style, color=colour, linewidth=2.0)
        if len(accuracy) > 1:
            deviation = accuracy.std(axis=0, ddof=1)
            axes.fill_between(
                epochs, mean - deviation, mean + deviation, color=colour, alpha=0.11, linewidth=0
            )
        ends.append((float(mean[-1]), row["name"], colour))
        means.append(mean)
    last = max(row["runs"][0]["metrics"]["epoch"][-1] for row in rows)
    axes.set_xlim(1, last)
    # The first epochs may lie outside the plotted range.
    low = min(np.nanmin(mean[len(mean) // 4 :]) for mean in means)
    high = max(np.nanmax(mean) for mean in means)
    room = 0.06 * (high - low) or 0.5
    axes.set_ylim(low - room, high + room)
    counts = {len(row["runs"]) for row in rows}
    seeds = f"{'up to ' if len(counts) > 1 else ''}{max(counts)} seeds"
    band = f", mean and standard deviation of {seeds}" if max(counts) > 1 else ", one seed"
    axes.set_title(f"{TITLES.get(data, data)}{band}", fontsize=11.5)
    axes.set_ylabel("test accuracy (%)", fontsize=11)
    axes.tick_params(labelsize=10.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(True, axis="y")
    axes.set_axisbelow(True)
    frozen = {
        min(math.ceil(row["settings"]["allocation"]["until"] * last), last - 1)
        for row in rows
        if _has_rounds(row)
    }
    for epoch in frozen:
        axes.axvline(epoch, color=MUTED, linewidth=1.0, linestyle=(0, (2, 3)))
        axes.text(
            epoch,
            0.03,
            "  re-allocation ends",
            color=MUTED,
            fontsize=10,
            transform=axes.get_xaxis_transform(),
        )
    _label_ends(axes, ends)


def _has_rounds(row: dict[str, Any]) -> bool:
    return any(sum(run["metrics"].get("deallocated", [0])) for run in row["runs"])


def _label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Label the curves at the right with name and last value, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    gap = (high - low) / 15
    order = sorted(ends, reverse=True)
    places = [end for end, _, _ in order]
    for _ in range(200):  # neighbours push each other apart until hardly any overlap is left
        for upper in range(len(places) - 1):
            lack = max(0.0, gap - (places[upper] - places[upper + 1]))
            places[upper] += lack / 2
            places[upper + 1] -= lack / 2
        places[0] = min(places[0], high)
        places[-1] = max(places[-1], low)
    outside = axes.get_yaxis_transform()
    for place, (end, name, colour) in zip(places, order, strict=True):
        axes.plot([1.005, 1.04], [end, place], color=colour, linewidth=0.8, transform=outside, clip_on=False)
        axes.text(
            1.05, place, f"{end:.2f}  {name}", color=colour, fontsize=10.5, va="center", transform=outside
        )
