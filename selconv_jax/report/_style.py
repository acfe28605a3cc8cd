"""Common style of all pictures (colours, sizes and settings), and their saving."""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.container import Container
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from selconv_jax._utils.files import write_atomically
from selconv_jax.errors import ConfigError

# From the palette of Okabe and Ito, which remains distinguishable with common colour blindness. The
# three states also differ in lightness, so that a greyscale print is readable.
OWN = "#56B4E9"
COPY = "#D55E00"
CLOSED = "#E6E6E6"
INK = "#222222"
MUTED = "#666666"

# Options of texts: at a distance in points from a place, also outside of the axes; readable over lines.
BESIDE: dict[str, Any] = {"textcoords": "offset points", "va": "center", "annotation_clip": False}
OUTLINED: dict[str, Any] = {"ha": "center", "path_effects": [withStroke(linewidth=2, foreground="white")]}

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
    """Create a figure (in inches of 120 pixels) without global state, whose texts do not overlap."""
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
    return Figure(figsize=(width, height), dpi=120, layout=layout)


def draw_over_epochs(
    axes: Axes, epochs: NDArray[np.float64], values: NDArray[np.float64], style: str, **options: Any
) -> None:
    """Draw a line, broken at NaN; epochs have markers if there are few of them or if they stand alone."""
    known = np.pad(np.isfinite(values), 1)
    alone = known[1:-1] & ~known[:-2] & ~known[2:]
    marked = alone | (len(epochs) <= 40)
    axes.plot(epochs, values, style, marker="o", markevery=marked, markersize=3.5, linewidth=1.4, **options)


def heading(axes: Axes, title: str, handles: Sequence[Artist | Container] | None = None) -> None:
    """Put the title and the legend above a panel, where they hide no data; by default of all artists."""
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


@styled
def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as PNG, atomically; equal figures give equal bytes.

    An interrupted or failed call leaves an existing file intact. The file contains neither the date nor the
    version of the drawing library.

    Args:
        figure: The figure.
        path: The file, ending in ``.png``; missing folders are created.

    Raises:
        ConfigError: The path does not end in ``.png``.

    Example:
        >>> from matplotlib.figure import Figure
        >>> from selconv_jax.report import save_figure
        >>> save_figure(Figure(), "empty.png")
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ConfigError(f"pictures are saved as PNG, but {str(path)!r} has another suffix: name it *.png.")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": "selconv_jax"})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, picture.getvalue())
