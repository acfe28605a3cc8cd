"""Learning curves of a run, with the allocation of its channels over time."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.container import Container
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from selconv_jax.report._statistics import best_index, last_change, require_records, series, with_gaps
from selconv_jax.report._style import CLOSED, COPY, INK, OWN, draw_over_epochs, heading, new_figure, styled

_SPLITS = (("train", "#0072B2"), ("validation", "#CC79A7"), ("test", "#D55E00"))


@styled
def learning_curves(records: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Draw loss, accuracy, allocation, learning rate and speed over the epochs of a run.

    There are four panels, and two more if the model has selective layers: the state of the channels after
    each epoch's round, and the changes of the round. A star marks the epoch of the best validation
    accuracy, if there are validation images and no record is missing. A dashed line marks the last epoch
    that changed the allocation, once a later epoch has confirmed it.

    Args:
        records: The lines of ``metrics.jsonl``, one per epoch, in order. A key that is missing or
            null leaves a gap, and so does a missing epoch. Accuracies are fractions in [0, 1]; ``epoch`` is
            1-based.
        title: Title of the picture, such as the name of the run.

    Raises:
        SelconvError: ``records`` is empty.

    Example:
        >>> from selconv_jax.report import learning_curves
        >>> record = {"epoch": 1, "train_loss": 2.3, "train_accuracy": 0.1, "learning_rate": 0.1}
        >>> figure = learning_curves([record], "quickstart")
    """
    require_records(records)
    records = with_gaps(records)
    epochs = series(records, "epoch")
    allocated = bool(np.nansum(series(records, "channels")) > 0)
    figure = new_figure(10.0, 8.4 if allocated else 5.8)
    figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
    grid = figure.subplots(3 if allocated else 2, 2, sharex=True)

    _draw_loss(grid[0, 0], records, epochs)
    _draw_accuracy(grid[0, 1], records, epochs)
    if allocated:
        _draw_states(grid[1, 0], records, epochs)
        _draw_changes(grid[1, 1], records, epochs)
    for axes, key, title in zip(
        grid[-1], ("learning_rate", "images_per_second"), ("Learning rate", "Training speed"), strict=True
    ):
        _draw_lines(axes, epochs, [("", series(records, key), INK, "-")])
        _start_at_zero(axes)
        axes.set(xlabel="epoch", ylabel=key.replace("_", " "))
        heading(axes, title)
    for axes in grid.flat:
        axes.set_xlim(epochs.min() - 0.6, epochs.max() + 0.6)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(True, axis="y")
        axes.set_axisbelow(True)
    return figure


def _draw_lines(
    axes: Axes, epochs: NDArray[np.float64], lines: Sequence[tuple[str, NDArray[np.float64], str, str]]
) -> None:
    """Draw lines (label, values, colour, line style), skipping quantities that were never logged."""
    for label, values, colour, style in lines:
        if not np.isnan(values).all():
            draw_over_epochs(axes, epochs, values, style, color=colour, label=label, clip_on=False)


def _start_at_zero(axes: Axes) -> None:
    """Scale the axis from 0 to slightly above the highest value, even if that is 0."""
    top = axes.dataLim.y1
    axes.set_ylim(0, 1.06 * top if np.isfinite(top) and top > 0 else 1)


def _draw_freeze(axes: Axes, records: Sequence[Mapping[str, Any]]) -> list[Artist]:
    epoch = last_change(records)
    if epoch is None:
        return []
    label = f"unchanged after epoch {epoch}"
    return [axes.axvline(epoch + 0.5, color=INK, ls=(0, (4, 3)), lw=1.2, label=label)]


def _draw_loss(axes: Axes, records: Sequence[Mapping[str, Any]], epochs: NDArray[np.float64]) -> None:
    _draw_lines(axes, epochs, [(key, series(records, f"{key}_loss"), colour, "-") for key, colour in _SPLITS])
    axes.set_ylabel("cross entropy")
    heading(axes, "Loss")


def _draw_accuracy(axes: Axes, records: Sequence[Mapping[str, Any]], epochs: NDArray[np.float64]) -> None:
    lines = [
        *((key, 100 * series(records, f"{key}_accuracy"), colour, "-") for key, colour in _SPLITS),
        ("test top 5", 100 * series(records, "test_top5"), "#009E73", "--"),
    ]
    _draw_lines(axes, epochs, lines)
    title, best = "Accuracy", best_index(records)
    if best is not None:
        accuracy = 100 * float(series(records, "validation_accuracy")[best])
        star: dict[str, Any] = {"markersize": 12, "markerfacecolor": "#F0E442", "markeredgecolor": INK}
        axes.plot(epochs[best], accuracy, "*", label="best", zorder=5, clip_on=False, **star)
        title += f" (best on validation: {accuracy:.2f} %, epoch {epochs[best]:.0f})"
    axes.set_ylabel("correct (%)")
    heading(axes, title)


def _draw_states(axes: Axes, records: Sequence[Mapping[str, Any]], epochs: NDArray[np.float64]) -> None:
    """Draw stacked bars, which suit one epoch as well as three hundred."""
    channels = series(records, "channels")
    opened = series(records, "open_channels")
    copies = np.nan_to_num(series(records, "copies"))  # gate-only models log none
    bottom = np.zeros_like(channels)
    handles: list[Artist | Container] = []
    for label, count, colour in (
        ("own channel", opened - copies, OWN),
        ("copy", copies, COPY),
        ("closed", channels - opened, CLOSED),
    ):
        share = 100 * np.nan_to_num(count / channels)
        if share.any():
            handles.append(axes.bar(epochs, share, 1.0, bottom, color=colour, label=label, linewidth=0))
        bottom = bottom + share
    axes.set(ylabel="share of the channels (%)", ylim=(0, 100))
    total = int(np.nanmax(channels))
    handles += _draw_freeze(axes, records)
    heading(axes, f"What the {total:,} channels of the selective layers read", handles)


def _draw_changes(axes: Axes, records: Sequence[Mapping[str, Any]], epochs: NDArray[np.float64]) -> None:
    """Draw narrow bars over wide ones, as most closed channels are re-allocated in the same round."""
    closed = np.nan_to_num(series(records, "deallocated"))
    reallocated = np.nan_to_num(series(records, "reallocated"))
    handles: list[Artist | Container] = [
        axes.bar(epochs, closed, 1.0, color="#B0B0B0", label="de-allocated", linewidth=0)
    ]
    if reallocated.any():
        handles.append(axes.bar(epochs, reallocated, 0.5, color=COPY, label="re-allocated", linewidth=0))
    _start_at_zero(axes)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("channels")
    handles += _draw_freeze(axes, records)
    heading(axes, "Channels changed at the end of each epoch", handles)
