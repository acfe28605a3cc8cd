"""Channel map of one layer: the state of every slot, its damage score, and the sources of its copies."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.container import Container
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from selconv_jax.report._layer_allocation import LayerAllocation
from selconv_jax.report._source_cards import CARD_HEIGHT, COLUMNS, FRAME_HEIGHT, draw_cards
from selconv_jax.report._style import CLOSED, COPY, INK, MUTED, OUTLINED, OWN, heading, new_figure, styled

_STRIP = 9.0  # inches for the cells, without the row labels
_CARDS = 11  # channels shown with their copies; with the explaining card, three rows


@styled
def channel_map(layer: LayerAllocation, run: str = "") -> Figure:
    """Draw which channel each slot of one layer reads.

    The picture has three parts: a strip of cells, one per slot in index order, coloured by state; the
    damage score of every slot, if known; and one card per copied channel, the most copied first, with an
    arrow per copy from the unshifted position to the position that it reads, to scale.

    Args:
        layer: The allocation of the layer, with any number of channels and of spatial axes. Of three
            axes the last two are drawn, and the shift along the first is printed beside the arrow.
        run: Subtitle, such as the name of the run and the step.

    Example:
        >>> import numpy as np
        >>> from selconv_jax.report import LayerAllocation, channel_map
        >>> layer = LayerAllocation("conv", np.array([True, False]), None, None, None, 16)
        >>> figure = channel_map(layer)
    """
    shown = list(layer.copies_of)[:_CARDS]
    # Large cells for few channels, but room for thousands.
    per_row = 32 if layer.channels <= 128 else 64 if layer.channels <= 2048 else 128
    rows_of_cells = -(-layer.channels // per_row)
    rows_of_cards = -(-(1 + len(shown)) // COLUMNS) if shown else 0
    heights = {"header": 1.05 if run else 0.85, "strip": 0.85 + _STRIP / per_row * rows_of_cells}
    if layer.score is not None:
        heights["score"] = 1.9
    heights["cards"] = FRAME_HEIGHT + CARD_HEIGHT * rows_of_cards if shown else 0.45
    figure = new_figure(10.0, sum(heights.values()))
    stack = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=list(heights.values()))
    parts = dict(zip(heights, stack[:, 0], strict=True))

    _write_header(parts["header"], layer, run)
    _draw_strip(parts["strip"].subplots(), layer, per_row)
    if "score" in parts:
        _draw_scores(parts["score"].subplots(), layer, shown)
    if shown:
        draw_cards(parts["cards"], layer, shown, rows_of_cards)
    else:
        reason = "No slot of this layer is a copy."
        if layer.source is None:
            reason = "This layer is gate-only: its closed slots are not re-allocated, it has no copies."
        parts["cards"].text(0.01, 0.6, reason, va="center")
    return figure


def _write_header(part: SubFigure, layer: LayerAllocation, run: str) -> None:
    part.text(0.01, 0.92, layer.name, fontsize=12, fontweight="bold", va="top")
    part.text(0.01, 0.69, run, color=MUTED, va="top")
    text = (
        f"Input channels: {layer.channels:,}. Output channels: {layer.features:,}. "
        "The weights that belong to one input channel are a slot.\n"
        "A slot reads the channel of its own number, or is a copy, which reads a channel at a "
        "shifted position, or is closed and reads nothing."
    )
    part.text(0.01, 0.46 if run else 0.55, text, va="top", linespacing=1.5)


def _draw_strip(axes: Axes, layer: LayerAllocation, per_row: int) -> None:
    """Draw one cell per slot; the labels of its row and column add up to its index."""
    rows = -(-layer.channels // per_row)
    states = np.select([layer.closed, layer.copy], [2, 1], 0)
    padded = np.pad(states, (0, rows * per_row - layer.channels), constant_values=-1)
    axes.imshow(
        np.ma.masked_equal(padded, -1).reshape(rows, per_row),
        cmap=ListedColormap([OWN, COPY, CLOSED]),
        vmin=0,
        vmax=2,
        interpolation="nearest",
    )
    cell = 72 * _STRIP / per_row  # points
    gap = min(1.5, 0.1 * cell)
    axes.vlines(np.arange(-0.5, per_row), -0.5, rows - 0.5, color="white", linewidth=gap)
    axes.hlines(np.arange(-0.5, rows), -0.5, per_row - 0.5, color="white", linewidth=gap)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    sign = "+" if rows > 1 else ""
    columns = range(0, min(per_row, layer.channels), 4 if per_row < 128 else 8)
    axes.set_xticks(columns, [f"{sign}{column}" for column in columns])
    lines = range(0, rows, 1 if rows <= 16 else 4) if rows > 1 else []
    axes.set_yticks(lines, [f"{line * per_row:,}" for line in lines])

    row, column = np.divmod(np.arange(layer.channels), per_row)
    copied = np.isin(np.arange(layer.channels), list(layer.copies_of))
    line = 0.07 * cell
    for marked, mark, colour, share in ((layer.closed, "x", MUTED, 0.4), (copied, "o", INK, 0.65)):
        style: dict[str, Any] = {"color": colour, "fillstyle": "none", "ms": share * cell, "mew": line}
        axes.plot(column[marked], row[marked], mark, **style)
    handles: list[Artist | Container] = [
        Patch(color=colour, label=f"{kind}: {slots.sum():,}")
        for slots, colour, kind in (
            (layer.own, OWN, "reads its own channel"),
            (layer.copy, COPY, "copy of channel s shifted by b"),
            (layer.closed, CLOSED, "closed (crossed)"),
        )
        if slots.any()
    ]
    if copied.any():
        label = f"a channel that copies read: {copied.sum():,}"
        handles.append(Line2D([], [], marker="o", color=INK, fillstyle="none", linestyle="", label=label))
    title = "The slots in the order of their numbers"
    if rows > 1:
        title += " (row label + column label = number)"
    if layer.source is not None and cell > 18:  # the number of the source fits
        for slot in np.flatnonzero(layer.copy):
            place = (column[slot], row[slot])
            axes.annotate(str(layer.source[slot]), place, color="w", ha="center", va="center")
        if layer.copy.any():
            title += "; in a copy: the number s of the channel it reads"
    heading(axes, title, handles)


def _draw_scores(axes: Axes, layer: LayerAllocation, shown: Sequence[int]) -> None:
    """Draw bars in index order, and the indices of the shown sources unless they overlap."""
    assert layer.score is not None
    width = min(14.0, max(0.8, 0.75 * 72 * _STRIP / layer.channels))
    slots = np.arange(layer.channels)
    for state, colour in ((layer.own, OWN), (layer.copy, COPY)):
        axes.vlines(slots[state], 0, layer.score[state], color=colour, linewidth=width)
    numbered: list[int] = []
    for source in shown:
        if all(abs(source - other) > layer.channels / 40 for other in numbered):
            numbered.append(source)
            place = (source, float(layer.score[source]))
            axes.annotate(str(source), place, (0, 2), textcoords="offset points", fontsize=7.5, **OUTLINED)
    axes.set_xlim(-0.6, max(layer.channels, 8) - 0.4)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if layer.channels < 8:
        axes.set_xticks(slots)
    axes.set_ylim(0, 1.2 * float(np.max(layer.score)) or 1.0)
    axes.set(xlabel="slot", ylabel="score")
    title = "Damage score of every slot: how much the output would change without it"
    heading(axes, f"{title} (numbers: copied channels, where they fit)" if numbered else title, [])
