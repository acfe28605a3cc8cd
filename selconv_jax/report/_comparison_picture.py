"""Picture of a comparison of configurations: test error over the epochs and at the end."""

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from selconv_jax.errors import SelconvError
from selconv_jax.report._comparison import MARK, ConfigurationResults, number_differences
from selconv_jax.report._statistics import series, spread
from selconv_jax.report._style import BESIDE, INK, draw_over_epochs, heading, new_figure, styled

# Okabe and Ito without yellow, which is invisible on white; further ones differ in line style.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", INK)
_STYLES: tuple[str, ...] = ("-", "--", ":", "-.")
_LETTERS = 40  # of a line of a name
_WIDE = 4.0  # from this ratio of the highest to the lowest error on, the curves' axis is logarithmic


@styled
def comparison_picture(configurations: Sequence[ConfigurationResults], title: str) -> Figure:
    """Draw the test error per epoch, and that of the last epoch with one point per seed.

    Curves are in the first axes; final errors in the second, whose row labels name the curves.
    """
    if not configurations:
        raise SelconvError("there is no finished run, so there is nothing to compare.")
    labels = ["\n".join(textwrap.wrap(configuration.name, _LETTERS)) for configuration in configurations]
    figure = new_figure(11.0, 1.3 + max(2.2, sum(0.24 + 0.14 * (1 + label.count("\n")) for label in labels)))
    figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
    curves, finals = figure.subplots(1, 2, width_ratios=[1.2, 1.0])
    for row, configuration in enumerate(configurations):
        colour = _COLOURS[row % len(_COLOURS)]
        style = _STYLES[row // len(_COLOURS) % len(_STYLES)]
        difference = number_differences(configuration, configurations[0]).get("test_error")
        mark = difference is not None and difference.excludes_zero
        _draw_curve(curves, configuration, colour, style)
        _draw_final(finals, row, configuration, colour, style, mark=mark)
    several = any(len(configuration.runs) > 1 for configuration in configurations)
    _finish_curves(curves, several)
    _finish_finals(finals, labels, several)
    if any(MARK in text.get_text() for text in finals.texts):
        note = f"{MARK}: other than the first row by more than chance (95%, paired by seed)"
        finals.set_xlabel(f"{finals.get_xlabel()}\n{note}")
    return figure


def _errors(configuration: ConfigurationResults) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return epochs ``[E]`` and test errors in percent ``[seeds, E]``; NaN where a seed has none."""
    by_seed = [
        dict(zip(series(records, "epoch"), 100 * (1 - series(records, "test_accuracy")), strict=True))
        for records in configuration.runs.values()
    ]
    known = set().union(*by_seed)
    epochs = np.arange(min(known), max(known) + 1)  # with those of which no seed has a record
    errors = [[run.get(epoch, np.nan) for epoch in epochs] for run in by_seed]
    return epochs, np.array(errors)


def _draw_curve(axes: Axes, configuration: ConfigurationResults, colour: str, style: str) -> None:
    """Draw the mean of the epochs for which all seeds have a value, and the standard deviation."""
    epochs, errors = _errors(configuration)
    mean = errors.mean(axis=0)
    draw_over_epochs(axes, epochs, mean, style, color=colour)
    if len(errors) > 1:
        deviation = errors.std(axis=0, ddof=1)
        axes.fill_between(epochs, mean - deviation, mean + deviation, color=colour, alpha=0.18, linewidth=0)


def _draw_final(
    axes: Axes, row: int, configuration: ConfigurationResults, colour: str, style: str, *, mark: bool
) -> None:
    """Draw one row: its line style, the seeds, and below them the mean and deviation, also as text."""
    outside = axes.get_yaxis_transform()
    axes.plot([-0.125, -0.02], [row, row], style, color=colour, lw=1.6, transform=outside, clip_on=False)
    errors = [100 * value for value in configuration.by_seed.get("test_error", {}).values()]
    if not errors:
        return
    end = spread(errors)
    places = [row if end.std is None else row - 0.14] * len(errors)
    axes.plot(errors, places, "o", color=colour, markersize=6, alpha=0.6, markeredgewidth=0)
    text = f"{end.mean:.2f}"
    if end.std is not None:
        axes.errorbar(end.mean, row + 0.18, xerr=end.std, fmt="|", color=colour, ms=8, mew=2, capsize=3)
        text += f" ± {end.std:.2f}{f' {MARK}' * mark}"
    axes.annotate(text, (1.0, row), (6, 0), xycoords=("axes fraction", "data"), **BESIDE)


def _finish_curves(axes: Axes, several: bool) -> None:
    axes.set_xlabel("epoch" + (" (line: mean of the seeds; band: ± standard deviation)" * several))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    means = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.get_lines()])
    means = means[np.isfinite(means)]
    # A band that reaches 0 cannot be drawn on a logarithmic axis.
    if means.size and axes.dataLim.ymin > 0 and _WIDE * means.min() < means.max():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylabel("test error (%), logarithmic")
    else:
        axes.set_ylabel("test error (%)")
    axes.grid(True, axis="y")
    axes.set_axisbelow(True)
    heading(axes, "After each epoch (the names of the lines are at the right)", [])


def _finish_finals(axes: Axes, labels: Sequence[str], several: bool) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.tick_params(axis="y", length=0, pad=42)  # beside the pieces of the lines
    axes.set_ylim(len(labels) - 0.4, -0.6)
    low, high = axes.dataLim.intervalx
    if np.isfinite([low, high]).all():
        room = 0.08 * (high - low) or 0.5
        axes.set_xlim(low - room, high + room)
    axes.set_xlabel("test error (%)" + ("; points: seeds, bars: mean ± standard deviation" * several))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.grid(True, axis="x")
    axes.set_axisbelow(True)
    heading(axes, "After the last epoch", [])
