"""Cards of the copied channels, with an arrow for the shift of each copy."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from selconv_jax.report._layer_allocation import LayerAllocation
from selconv_jax.report._style import COPY, INK, MUTED, OUTLINED, OWN

COLUMNS = 4
CARD_HEIGHT = 2.85  # inches
FRAME_HEIGHT = 0.9  # inches: the legend above the cards and the line below them
_FOOT = 0.3

_SMALL = 7.5  # points
_LETTER = np.array([0.068, 0.13])  # inches that one digit takes at this size
_INCHES = 2.0  # width and height of a card's pixels
_TURNS = np.array([0, 1, -1, 2, -2, 3, -3, 4, -4, 5, -5, 6, -6, 7, -7, 8]) * np.pi / 8
_HOLLOW: dict[str, Any] = {"marker": "o", "color": "white", "mec": MUTED, "ms": 7, "mew": 1.5}


def draw_cards(part: SubFigure, layer: LayerAllocation, shown: Sequence[int], rows: int) -> None:
    """Draw an explaining card, then one for each of the ``shown`` keys of ``layer.copies_of``."""
    assert layer.shift is not None
    dimensions = layer.shift.shape[1]
    ratios = [FRAME_HEIGHT - _FOOT, rows * CARD_HEIGHT, _FOOT]
    head, body, foot = part.subfigures(3, 1, squeeze=False, height_ratios=ratios)[:, 0]
    title = "What the copies read: a card for each copied channel, the most copied first"
    head.text(0.01, 0.95, title, fontsize=9.5, fontweight="bold", va="top")
    head.legend(handles=_legend(dimensions), loc="lower left", bbox_to_anchor=(0, 0), ncols=3)
    foot.text(0.01, 0.5, _left_out(layer, shown), va="center")

    ends = layer.shift[layer.copy][:, -2:]
    reach = max(2, int(np.abs(ends).max() + 0.7)) + 0.5  # whole pixels, and room for labels
    grid = body.subplots(rows, COLUMNS, squeeze=False).ravel()
    _draw_key(grid[0], reach, flat=dimensions == 1)
    for axes, source in zip(grid[1:], shown, strict=False):
        _draw_card(axes, layer, source, reach)
    for axes in grid[1 + len(shown) :]:
        axes.set_axis_off()


def _legend(dimensions: int) -> list[Line2D]:
    own = "the slot of that number, unshifted"
    other = "that slot is closed or a copy"
    arrow = "a copy, with its slot's number: reads at the arrow's end"
    if dimensions > 2:
        arrow = "a copy: slot's number (shift along the first axis)"
    return [
        Line2D([], [], color=OWN, marker="o", markersize=7, linestyle="", label=own),
        Line2D([], [], **_HOLLOW, linestyle="", label=other),
        Line2D([], [], color=COPY, marker=">", label=arrow),
    ]


def _left_out(layer: LayerAllocation, shown: Sequence[int]) -> str:
    """Describe the copied channels that the cards do not show; "" if there are none."""
    counts = [slots.size for source, slots in layer.copies_of.items() if source not in shown]
    if not counts:
        return ""
    channels = "1 further channel" if len(counts) == 1 else f"{len(counts):,} further channels"
    least, most = min(counts), max(counts)
    each = f"{most:,}" if most == least else f"{least:,} to {most:,}"
    return f"… and {channels} with {each} {'copy' if most == 1 else 'copies'} each."


def _draw_pixels(axes: Axes, reach: float, lanes: int | None) -> None:
    """Draw a grid of pixels around the unshifted one, rows downwards; for one axis, a lane per copy."""
    edges = np.arange(-reach, reach + 0.5)
    top, bottom = (-reach, reach) if lanes is None else (-0.7, lanes + 0.7)
    axes.vlines(edges, top, bottom, color="#DDDDDD", linewidth=0.6, zorder=0)
    axes.set(xlim=(-reach, reach), ylim=(bottom, top))
    if lanes is None:
        axes.set_aspect("equal")
        axes.hlines(edges, -reach, reach, color="#DDDDDD", linewidth=0.6, zorder=0)
        axes.fill_between([-0.5, 0.5], -0.5, 0.5, color="#EEEEEE", linewidth=0)
    else:
        axes.axvspan(-0.5, 0.5, color="#EEEEEE", linewidth=0)
    axes.spines[:].set(visible=True, color="#CCCCCC")
    axes.tick_params(length=0)
    axes.set_xticks([])
    axes.set_yticks([])


def _draw_arrow(axes: Axes, start: Sequence[float], end: Sequence[float], colour: str, width: float) -> None:
    style = {"arrowstyle": "-|>", "color": colour, "linewidth": width, "mutation_scale": 5 + 3 * width}
    axes.annotate("", (end[0], end[1]), (start[0], start[1]), arrowprops=style | {"shrinkA": 0, "shrinkB": 0})


def _draw_title(axes: Axes, title: str, about: str) -> None:
    axes.set_title(title, pad=17)
    axes.text(0, 1.02, about, transform=axes.transAxes, va="bottom", fontsize=8)


def _draw_key(axes: Axes, reach: float, flat: bool) -> None:
    """Draw the first card: the scale, the axes and one example of a copy."""
    _draw_pixels(axes, reach, 3 if flat else None)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if flat:
        _draw_title(axes, "How to read a card", "one line per copy")
        axes.set_xlabel("shift (pixels) →")
        _draw_arrow(axes, (0, 2), (1, 2), COPY, 1.2)
        axes.text(1, 2.3, "slot 9 reads\n1 pixel ahead", fontsize=_SMALL, ha="center", va="top")
    else:
        _draw_title(axes, "How to read a card", "each square is one pixel")
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xlabel("column shift (pixels) →")
        axes.set_ylabel("← row shift (pixels)")
        _draw_arrow(axes, (0, 0), (1, 1), COPY, 1.2)
        text = "slot 9 reads\n1 down, 1 right"
        axes.text(1, 1.25, text, fontsize=_SMALL, ha="center", va="top")
    height = 0.4 if flat else -1.5
    _draw_arrow(axes, (-1.5, height), (-0.5, height), INK, 1.2)
    axes.text(-0.35, height, "1 pixel", fontsize=_SMALL, va="center")


def _draw_card(axes: Axes, layer: LayerAllocation, source: int, reach: float) -> None:
    """Draw one copied channel: its own slot at the centre, and an arrow per copy."""
    assert layer.source is not None
    assert layer.shift is not None
    slots = layer.copies_of[source]
    dimensions = layer.shift.shape[1]
    _draw_pixels(axes, reach, slots.size if dimensions == 1 else None)
    state = "reads it unshifted"
    if layer.closed[source]:
        state = "is closed"
    elif layer.source[source] == source:
        state = "reads it shifted"
    elif layer.copy[source]:
        state = f"is a copy of channel {layer.source[source]}"
    copies = f"{slots.size:,} {'copy' if slots.size == 1 else 'copies'}"
    _draw_title(axes, f"Channel {source}: {copies}", f"slot {source} {state}")
    if layer.own[source]:
        axes.plot(0, 0, "o", color=OWN, markersize=7, zorder=3)
    else:
        axes.plot(0, 0, **_HOLLOW, zorder=3)

    across = layer.shift[slots, -1]
    if dimensions == 1:
        down = np.arange(1.0, slots.size + 1)
        starts = np.stack([np.zeros_like(down), down], axis=1)
    else:
        down = layer.shift[slots, -2]
        starts = np.zeros((slots.size, 2))
    ends = np.stack([across, down], axis=1)
    for start, end in zip(starts, ends, strict=True):
        _draw_arrow(axes, start, end, COPY, 1.2 if slots.size <= 16 else 0.7)
    labels = [str(slot) for slot in slots]
    if dimensions > 2:
        along = np.round(layer.shift[slots, 0], 1) + 0.0  # no "-0.0"
        labels = [f"{slot} ({first:+.1f})" for slot, first in zip(slots, along, strict=True)]
    _write_labels(axes, labels, starts, ends)


def _write_labels(
    axes: Axes, labels: Sequence[str], starts: NDArray[np.floating], ends: NDArray[np.floating]
) -> None:
    """Write each label beside its arrow's end, where it overlaps neither an end nor a label.

    A label without such a place is left out, and the card states how many labels it has.
    """
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    low, high = np.array([left, top]), np.array([right, bottom])  # rows count downwards
    scale = (high - low) / _INCHES
    taken = [(place, 0.04 * scale) for place in (*ends, np.zeros(2))]
    numbered = 0
    spans = ends - starts
    for index in np.argsort(-np.hypot(*spans.T), kind="stable"):  # longest first: they have most room
        label, end = labels[index], ends[index]
        half = 0.5 * scale * _LETTER * (len(label) + 0.6, 1)
        for angle in np.arctan2(spans[index, 1], spans[index, 0]) + _TURNS:
            center = end + (half + 0.06 * scale) * (np.cos(angle), np.sin(angle))
            inside = (center - half > low).all() and (center + half < high).all()
            if inside and all((abs(center - other) > half + size).any() for other, size in taken):
                taken.append((center, half))
                numbered += 1
                axes.annotate(label, (center[0], center[1]), fontsize=_SMALL, va="center", **OUTLINED)
                break
    if numbered < len(labels):
        axes.set_xlabel(f"{numbered} of {len(labels)} copies numbered", fontsize=_SMALL)
