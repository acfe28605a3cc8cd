"""Picture of a benchmark: bars of the medians with their spread and ratios."""

import dataclasses
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selconv_jax._bench.report import ratio_text
from selconv_jax._bench.rows import Row, rows_of
from selconv_jax._bench.run import NetworkResult
from selconv_jax.errors import SelconvError
from selconv_jax.report._style import COPY, INK, MUTED, OWN, heading, new_figure, styled

_WIDTH = 10.0
_PER_BAR, _PER_PANEL = 0.27, 0.85  # inches
# By the first word of a name; from the palette of Okabe and Ito.
_COLOURS = {"plain": OWN, "selective": COPY, "frozen": "#009E73", "compact": "#CC79A7", "torch": "#999999"}
_OTHER = "#F0C987"


@dataclasses.dataclass(frozen=True)
class Bar:
    """One bar, with the ends of its spread, if any, and the text at its right."""

    label: str
    value: float
    low: float | None
    high: float | None
    text: str


@dataclasses.dataclass(frozen=True)
class Panel:
    """Bars on one scale, from the top, and the unit of their lengths."""

    title: str
    unit: str
    bars: Sequence[Bar]


def panels_of(result: NetworkResult) -> list[Panel]:
    """Make the panels of a network, one for each group of timed cases."""
    groups: dict[str, list[Row]] = {}
    for row in rows_of(result):
        if row.summary is not None:
            groups.setdefault(row.group, []).append(row)
    return [
        Panel(
            f"{result.model}: {group}",
            "ms per step" if group == "training step" else "ms per call",
            [_bar(row) for row in rows],
        )
        for group, rows in groups.items()
    ]


@styled
def bar_picture(panels: Sequence[Panel], title: str, caption: str) -> Figure:
    """Draw panels of horizontal bars, one below the other.

    The axes of the figure are the panels; the caption is the text below them, such as the machine.

    Raises:
        SelconvError: There are no bars.
    """
    if not panels:
        raise SelconvError("nothing was timed, so there is no picture to draw.")
    heights = [_PER_PANEL + _PER_BAR * len(panel.bars) for panel in panels]
    figure = new_figure(_WIDTH, 0.75 + sum(heights))
    figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
    figure.supxlabel(caption, fontsize=7.5, color=MUTED, x=0.01, ha="left")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, at in zip(panels, axes, strict=True):
        _draw(at, panel)
    return figure


def _draw(axes: Axes, panel: Panel) -> None:
    for place, bar in enumerate(panel.bars):
        kind = bar.label.removeprefix("eval ").replace(",", " ").split()[0]
        axes.barh(place, bar.value, height=0.68, color=_COLOURS.get(kind, _OTHER))
        end = bar.value
        if bar.low is not None and bar.high is not None:
            spread = [[bar.value - bar.low], [bar.high - bar.value]]
            axes.errorbar(bar.value, place, xerr=spread, color=INK, capsize=2.5, lw=1.0, fmt="none")
            end = max(end, bar.high)
        axes.annotate(bar.text, (end, place), (6, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(panel.bars)), [bar.label for bar in panel.bars])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(panel.bars) - 0.4, -0.6)
    longest = max(bar.value if bar.high is None else max(bar.value, bar.high) for bar in panel.bars)
    axes.set_xlim(0, 1.45 * longest)  # room for the texts
    axes.set_xlabel(panel.unit)
    axes.grid(True, axis="x")
    axes.set_axisbelow(True)
    heading(axes, panel.title, [])


def _bar(row: Row) -> Bar:
    assert row.summary is not None
    median = 1e3 * row.summary.median
    parts = [f"{median:,.{0 if median >= 100 else 1 if median >= 10 else 2}f} ms"]
    if row.ratio is not None:
        parts.append(f"{ratio_text(row.ratio.medians)} x {row.ratio.to}")
    if row.torch_ratio is not None:
        parts.append(f"{ratio_text(row.torch_ratio.medians)} x PyTorch")
    elif row.ratio is None and row.images_per_second is not None:
        parts.append(f"{row.images_per_second:,.0f} images/s")
    return Bar(row.name, median, 1e3 * row.summary.low, 1e3 * row.summary.high, "   ".join(parts))
