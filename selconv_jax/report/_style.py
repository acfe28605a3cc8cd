"""Common style of all pictures: colours, sizes and settings."""

from collections.abc import Sequence

import matplotlib.style
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.container import Container
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

__all__ = ["CLOSED", "COPY", "INK", "MUTED", "OWN", "heading", "new_figure", "styled"]

# From the palette of Okabe and Ito, which remains distinguishable with common colour blindness. The
# three states also differ in lightness, so that a greyscale print is readable.
OWN = "#56B4E9"
COPY = "#D55E00"
CLOSED = "#E6E6E6"
INK = "#222222"
MUTED = "#666666"

# "default" first, so that pictures do not depend on the user's matplotlibrc and equal data gives equal
# bytes. The object is a context manager and, as used here, a decorator.
styled = matplotlib.style.context(
    [
        "default",
        {
            "savefig.dpi": "figure",
            "font.size": 8.5,
            "axes.titlesize": 9.5,
            "axes.titlelocation": "left",
            "axes.titleweight": "bold",
            "axes.labelsize": 8.5,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": MUTED,
            "axes.labelcolor": INK,
            "text.color": INK,
            "text.parse_math": False,  # a name may hold dollar signs
            "xtick.color": MUTED,
            "ytick.color": MUTED,
            "xtick.labelcolor": INK,
            "ytick.labelcolor": INK,
            "legend.fontsize": 8.5,
            "legend.frameon": False,
            "grid.color": "#DDDDDD",
            "grid.linewidth": 0.6,
            "hatch.linewidth": 0.8,
        },
    ]
)


def new_figure(width: float, height: float) -> Figure:
    """Create a figure, without global state, whose layout keeps texts from overlapping.

    Args:
        width: Width in inches, of 120 pixels each.
        height: Height in inches.

    Returns:
        An empty figure with constrained layout.
    """
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
    return Figure(figsize=(width, height), dpi=120, layout=layout)


def heading(axes: Axes, title: str, handles: Sequence[Artist | Container] | None = None) -> None:
    """Put the title and the legend above a panel, where they cannot hide data.

    Args:
        axes: The panel, with its labelled artists already drawn.
        title: The title.
        handles: The legend's artists in order, on one line; None: all labelled ones.
    """
    if handles is None:
        handles, _ = axes.get_legend_handles_labels()
    axes.set_title(title, pad=20 if handles else 6)
    if handles:
        legend = axes.legend(
            handles=handles,
            loc="lower left",
            bbox_to_anchor=(0.0, 1.0),
            borderaxespad=0.3,
            borderpad=0.0,
            ncols=len(handles),
            columnspacing=1.0,
            handlelength=1.5,
            handletextpad=0.4,
        )
        legend.set_in_layout(False)  # a long line of entries must not squeeze the panel
