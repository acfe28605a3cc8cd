"""Draw the picture of the README that explains the method, into ``experiments/results/method.png``.

python experiments/method_picture.py
"""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from numpy.typing import NDArray

from selconv_jax.report import save_figure
from selconv_jax.report._style import CLOSED, COPY, INK, MUTED, OWN, new_figure, styled

# The worked example: six channels; slots 1 and 4 are closed, then become copies of 0 and 3.
_DAMAGE = (0.36, 0.006, 0.15, 0.30, 0.004, 0.18)
_COPIES = {1: (0, (1.25, -0.75)), 4: (3, (-0.5, 1.0))}  # slot: (source, (row shift, column shift))
_KERNEL = np.array([[0.2, 0.5, 0.2], [0.5, 1.0, 0.6], [0.1, 0.6, 0.3]])
_COPY_KERNEL = np.array([[0.4, 0.6, 0.1], [0.8, 0.9, 0.4], [0.3, 0.7, 0.2]])
_REPEATED = (
    "Repeated after every epoch of the first half of training. The weights of a new copy start at 0, so the "
    "network computes what it did before."
)
_HALF = 3  # the kernels are drawn on pixels -3..3


@styled
def method_picture() -> Figure:
    """Draw a schematic explanation of selective channel allocation.

    The upper row follows a layer of six channels through a round (method, "A round"): unequal
    damages, closed slots, slots that read the best channels through a shift.
    The lower row adds the kernel of a copy, spread over pixels by its bilinear shift, to that of the slot
    it copies, and shows the resulting larger kernel (batch norm and ReLU, which come between the shift
    and the kernel, are left out).

    Returns:
        The figure, with six axes.

    Example:
        >>> figure = method_picture()
    """
    figure = new_figure(10.0, 8.0)
    grid = figure.subplots(2, 3, height_ratios=[1.1, 1.0])
    _draw_layer(grid[0, 0], "1  Measure", "how much would the output change\nwithout each channel?", 1)
    _draw_layer(grid[0, 1], "2  De-allocate", "close the slots that matter least,\ntheir weights are free", 2)
    _draw_layer(
        grid[0, 2], "3  Re-allocate", "free slots read the best channels,\neach through its own shift", 3
    )

    down, right = _COPIES[1][1]
    own = _footprint(_KERNEL, 0.0, 0.0)
    copy = _footprint(_COPY_KERNEL, down, right)
    about = f"channel 0, read {down} pixels down\nand {-right} left: b = ({down:+}, {right:+})"
    _draw_kernel(grid[1, 0], own, "Slot 0", "its 3 x 3 weights on channel 0,\nunshifted", own=True)
    _draw_kernel(grid[1, 1], copy, "+   Slot 1, the copy", about, copy=True)
    _draw_kernel(
        grid[1, 2],
        own + copy,
        "=   Together",
        "one larger kernel on channel 0,\nas many weights as before",
        own=True,
        copy=True,
    )
    figure.supxlabel(_REPEATED, x=0.01, ha="left", fontsize=9.5)
    return figure


def _draw_layer(axes: Axes, title: str, about: str, stage: int) -> None:
    """Draw channels on the left, slots on the right, a line from each slot to its channel, and damages."""
    axes.set(xlim=(-0.9, 6.3), ylim=(5.5, -1.7), aspect="equal")
    axes.set_axis_off()
    axes.set_title(title, fontsize=12, pad=35)
    axes.text(0.0, 1.0, about, transform=axes.transAxes, va="bottom", fontsize=9.5)
    heads = [(0.0, "input\nchannel"), (3.1, "slot of\nthe kernel")] + [(4.9, "damage")] * (stage == 1)
    for x, text in heads:
        axes.text(x, -0.5, text, ha="center", va="bottom", color=MUTED)
    for channel, damage in enumerate(_DAMAGE):
        closed = stage > 1 and channel in _COPIES
        for offset in (0.12, 0.06, 0.0):  # a small stack: a feature map
            axes.add_patch(
                Rectangle((-0.3 + offset, channel - 0.3 - offset), 0.6, 0.6, fc="white", ec=INK, lw=0.8)
            )
        axes.text(0, channel, str(channel), ha="center", va="center")
        face = OWN if not closed else COPY if stage == 3 else CLOSED
        box = Rectangle((2.6, channel - 0.32), 1.0, 0.64, fc=face, ec=INK, lw=0.8)
        box.set_hatch("////" if closed and stage == 2 else "")
        axes.add_patch(box)
        axes.text(
            3.1,
            channel,
            str(channel),
            ha="center",
            va="center",
            bbox={"boxstyle": "round,pad=0.15", "fc": face, "ec": "none"},
        )
        if not closed:
            _draw_link(axes, channel, channel, INK)
        if stage == 1:
            axes.add_patch(Rectangle((3.9, channel - 0.2), 6 * damage, 0.4, fc=MUTED))
        elif closed and stage == 2:
            axes.text(3.85, channel, "closed", va="center")
        elif closed:
            source, shift = _COPIES[channel]
            _draw_link(axes, source, channel, COPY)
            text = f"copy of {source}\nb = ({shift[0]:+}, {shift[1]:+})"
            axes.text(3.85, channel, text, va="center", color=COPY, linespacing=1.3)


def _draw_link(axes: Axes, channel: float, slot: float, colour: str) -> None:
    axes.add_patch(
        FancyArrowPatch(
            (0.5, channel),
            (2.6, slot),
            arrowstyle="-|>",
            mutation_scale=10,
            color=colour,
            shrinkA=0,
            shrinkB=0,
            lw=1.6 if colour == COPY else 1.0,
        )
    )


def _footprint(kernel: NDArray[np.float64], down: float, right: float) -> NDArray[np.float64]:
    """Compute the weights of the pixels under a shifted 3 x 3 kernel, by bilinear interpolation."""
    pixels = np.arange(-_HALF, _HALF + 1)
    taps = np.arange(-1, 2)
    rows = np.maximum(0, 1 - np.abs(pixels[:, None] - (taps + down)))
    columns = np.maximum(0, 1 - np.abs(pixels[:, None] - (taps + right)))
    return rows @ kernel @ columns.T


def _draw_kernel(
    axes: Axes, weights: NDArray[np.float64], title: str, about: str, own: bool = False, copy: bool = False
) -> None:
    """Draw the weights of the channel's pixels, and the outlines of the kernels they result from."""
    edge = _HALF + 0.5
    axes.imshow(weights, cmap="Greys", vmin=0, vmax=1.8, extent=(-edge, edge, edge, -edge))
    axes.set_xticks(np.arange(-edge, edge + 1), minor=True)
    axes.set_yticks(np.arange(-edge, edge + 1), minor=True)
    axes.grid(which="minor")
    axes.tick_params(which="minor", length=0)
    axes.set_xticks(range(-_HALF, _HALF + 1))
    axes.set_yticks(range(-_HALF, _HALF + 1))
    axes.set(xlabel="columns (pixels)", ylabel="rows (pixels)")
    axes.set_title(title, fontsize=12, pad=38)
    axes.text(0.0, 1.03, about, transform=axes.transAxes, va="bottom", fontsize=9.5)
    down, right = _COPIES[1][1]
    if own:
        axes.add_patch(Rectangle((-1.5, -1.5), 3, 3, fill=False, ec=OWN, lw=2.5, zorder=3))
        axes.plot(0, 0, "o", color=OWN, ms=7, mec="white", zorder=4)
    if copy:
        axes.add_patch(
            Rectangle((right - 1.5, down - 1.5), 3, 3, fill=False, ec=COPY, lw=2.5, ls="--", zorder=3)
        )
        axes.annotate(
            "",
            (right, down),
            (0, 0),
            arrowprops={"arrowstyle": "-|>", "color": COPY, "lw": 2, "shrinkA": 0, "shrinkB": 0},
        )


if __name__ == "__main__":
    save_figure(method_picture(), Path(__file__).resolve().parent / "results" / "method.png")
