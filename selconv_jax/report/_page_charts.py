"""Line charts as SVG, for the page of a run; their colours are variables of the page."""

import html
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

_WIDTH, _HEIGHT = 420.0, 200.0
_MOST_MARKERS = 40  # places that have a marker each
_LEFT, _RIGHT, _TOP, _BOTTOM = 44.0, 8.0, 8.0, 22.0


class Line(NamedTuple):
    """A line of a chart: label, CSS colour, and a value per place on the horizontal axis, NaN for none."""

    label: str
    colour: str
    values: NDArray[np.float64]


def chart(title: str, places: NDArray[np.float64], lines: Sequence[Line]) -> str:
    """Draw lines over the places of a horizontal axis; lines without a value are left out, gaps kept."""
    lines = [line for line in lines if np.isfinite(line.values).any()]
    keys = "".join(
        f'<span class="key"><i style="background:{line.colour}"></i> {html.escape(line.label)}</span>'
        for line in lines
    )
    values = np.concatenate([line.values for line in lines]) if lines else np.zeros(1)
    low, high = min(0.0, float(np.nanmin(values))), float(np.nanmax(values))
    marks = MaxNLocator(4).tick_values(low, high if high > low else low + 1)
    low, high = float(marks[0]), float(marks[-1])
    first, last = float(places.min()) - 0.5, float(places.max()) + 0.5

    def x(place: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (place - first) / (last - first)

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * (value - low) / (high - low)

    parts = []
    for mark in marks:
        end = f'y1="{y(mark):.1f}" y2="{y(mark):.1f}" stroke="var(--line)"'
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" {end}/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{y(mark) + 4:.1f}" text-anchor="end">{mark:,.6g}</text>')
    for mark in MaxNLocator(8, integer=True, min_n_ticks=1).tick_values(places.min(), places.max()):
        if first < mark < last:
            parts.append(f'<text x="{x(mark):.1f}" y="{_HEIGHT - 6}" text-anchor="middle">{mark:,.6g}</text>')
    has_markers = len(places) <= _MOST_MARKERS
    for line in lines:
        known = np.isfinite(line.values)
        for part in np.split(np.arange(len(places)), np.flatnonzero(~known)):
            points = [(x(places[index]), y(line.values[index])) for index in part if known[index]]
            path = " ".join(f"{across:.1f},{down:.1f}" for across, down in points)
            if len(points) > 1:
                end = f'fill="none" stroke="{line.colour}" stroke-width="1.6"'
                parts.append(f'<polyline points="{path}" {end}/>')
            if has_markers or len(points) == 1:
                parts += [
                    f'<circle cx="{across:.1f}" cy="{down:.1f}" r="2.2" fill="{line.colour}"/>'
                    for across, down in points
                ]
    picture = f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" aria-label="{html.escape(title)}">'
    caption = f"<figcaption><b>{html.escape(title)}</b>{keys}</figcaption>"
    return f"<figure>{caption}{picture}{''.join(parts)}</svg></figure>"
