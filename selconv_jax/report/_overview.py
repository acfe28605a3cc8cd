"""Overview of the allocation of all layers of a network."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from selconv_jax.errors import SelconvError
from selconv_jax.report._layer_allocation import LayerAllocation
from selconv_jax.report._style import BESIDE, CLOSED, COPY, OWN, new_figure, styled

# label, attribute of the layer, colour
_STATES = (("own channel", "own", OWN), ("copy", "copy", COPY), ("closed", "closed", CLOSED))
_HEADER = 0.7  # inches
_LINES = 56  # layers per column of the picture
_LINE = 0.165  # inches per layer
_LETTER = 0.075  # inches per letter of a name


@styled
def allocation_overview(layers: Sequence[LayerAllocation], title: str) -> Figure:
    """Draw how many slots of every layer read their own channel, are copies, or are closed.

    Each layer has one line, in the given order: its name, a bar of the three fractions, and the three
    counts. Networks of many layers take several columns, with one pair of axes each.

    Args:
        layers: The layers of the network, in forward order.
        title: Title of the picture, such as the name of the run.

    Raises:
        SelconvError: ``layers`` is empty.

    Example:
        >>> import numpy as np
        >>> from selconv_jax.report import LayerAllocation, allocation_overview
        >>> layer = LayerAllocation("conv", np.array([True, False]), None, None, None, 16)
        >>> figure = allocation_overview([layer], "quickstart")
    """
    if not layers:
        raise SelconvError(
            "the model has no selective layer, so there is no allocation to show: train one with "
            'model.variant = "selective".'
        )
    columns = -(-len(layers) // _LINES)
    lines = -(-len(layers) // columns)
    names = _LETTER * max(len(layer.name) for layer in layers)
    body = 0.7 + _LINE * max(lines, 4)
    figure = new_figure(max(7.5, columns * (names + 4.0)), _HEADER + body)
    header, main = figure.subfigures(2, 1, squeeze=False, height_ratios=[_HEADER, body])[:, 0]
    grid = main.subplots(1, columns, squeeze=False)[0]
    for column, axes in enumerate(grid):
        _draw_column(axes, layers[column * lines : (column + 1) * lines], lines)

    totals = [sum(_counts(layers, state)) for _, state, _ in _STATES]
    handles = [
        Patch(color=colour, label=f"{label}: {total:,} ({total / sum(totals):.1%})")
        for (label, _, colour), total in zip(_STATES, totals, strict=True)
        if total
    ]
    header.text(0.01, 0.9, title, fontsize=11, fontweight="bold", va="top")
    header.legend(handles=handles, loc="lower left", bbox_to_anchor=(0.0, 0.0), ncols=3)
    return figure


def _counts(layers: Sequence[LayerAllocation], state: str) -> list[int]:
    return [int(getattr(layer, state).sum()) for layer in layers]


def _draw_column(axes: Axes, layers: Sequence[LayerAllocation], lines: int) -> None:
    """Draw stacked horizontal bars, and the counts in three columns of text to their right."""
    places = np.arange(len(layers))
    left = np.zeros(len(layers))
    for column, (label, state, colour) in enumerate(_STATES):
        counts = _counts(layers, state)
        share = np.array(counts) / [layer.channels for layer in layers]
        axes.barh(places, share, 0.78, left, color=colour)
        left = left + share
        texts = [label.split()[0], *(f"{count:,}" for count in counts)]
        for place, text in zip((-1.2, *places), texts, strict=True):
            axes.annotate(text, (1.0, place), (36 * column + 34, 0), ha="right", fontsize=8, **BESIDE)
    axes.set_yticks(places, [layer.name for layer in layers], fontsize=8)
    axes.set_xticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
    axes.set(xlim=(0, 1), ylim=(lines - 0.4, -0.6))
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
