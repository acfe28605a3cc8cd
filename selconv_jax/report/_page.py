"""One self-contained page of a run: facts, curves, allocation through the rounds, tables."""

import html
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

import numpy as np

from selconv_jax.analysis._layer_counts import LayerCounts, total_counts
from selconv_jax.report._layer_allocation import LayerAllocation
from selconv_jax.report._page_charts import Line, chart
from selconv_jax.report._statistics import require_records, series, with_gaps

_SHOWN = 60  # rounds at most, or the page of a long run gets too large


class RoundOfRun(NamedTuple):
    """The allocation after a round: its step, the layers, and the slots of each that the round closed."""

    step: int
    layers: Sequence[LayerAllocation]
    closed: Mapping[str, Sequence[int]]


def run_page(
    title: str,
    summary: Mapping[str, str],
    records: Sequence[Mapping[str, Any]],
    rounds: Sequence[RoundOfRun],
    counts: Sequence[LayerCounts] | str,
) -> str:
    """Write the page of a run as HTML that needs no other file and no network.

    Args:
        title: Title of the page.
        summary: Facts of the run by heading; ``"threshold"`` is quoted beside the rounds.
        records: The lines of ``metrics.jsonl``, one per epoch, in order.
        rounds: The allocation after each round, oldest first. Of more than 60, evenly spaced ones are shown.
        counts: From `selconv_jax.analysis.count_layers`, or why there are none.

    Raises:
        SelconvError: ``records`` is empty.
    """
    require_records(records)
    facts = "".join(f"<dt>{_text(key)}<dd>{_text(value)}" for key, value in summary.items())
    parts = [f"<dl>{facts}</dl>", "<h2>Curves</h2>", _curves(records)]
    if rounds:
        parts.append(_rounds(rounds, summary.get("threshold", "")))
    parts += ["<h2>Epochs</h2>", _epochs(records), "<h2>Parameters and multiply-adds</h2>", _counts(counts)]
    template = resources.files("selconv_jax.report").joinpath("page.html").read_text(encoding="utf-8")
    shown = sorted({*np.linspace(0, len(rounds) - 1, min(len(rounds), _SHOWN), dtype=int).tolist()})
    data = json.dumps(_data([rounds[index] for index in shown], len(rounds)), separators=(",", ":"))
    filled = {"title": _text(title), "body": "\n".join(parts), "data": data.replace("<", "\\u003c")}
    return re.sub(r"\{(title|body|data)\}", lambda found: filled[found[1]], template)


def _text(value: object) -> str:
    return html.escape(str(value))


def _curves(records: Sequence[Mapping[str, Any]]) -> str:
    records = with_gaps(records)
    epochs = series(records, "epoch")
    splits = ("train", "validation", "test")

    def of(name: str, scale: float = 1.0) -> list[Line]:
        return [
            Line(split, f"var(--{split})", scale * series(records, f"{split}_{name}")) for split in splits
        ]

    charts = [chart("Loss", epochs, of("loss")), chart("Accuracy, %", epochs, of("accuracy", 100))]
    channels, open_ = series(records, "channels"), series(records, "open_channels")
    if np.nansum(channels) > 0:
        copies = series(records, "copies")
        states = [
            Line("read their own channel", "var(--own)", open_ - copies),
            Line("copies", "var(--copy)", copies),
            Line("closed", "var(--muted)", channels - open_),
        ]
        changes = [
            Line("closed", "var(--muted)", series(records, "deallocated")),
            Line("filled", "var(--copy)", series(records, "reallocated")),
        ]
        charts.append(chart("Slots of all layers, after the epoch's rounds", epochs, states))
        charts.append(chart("Slots that the epoch's rounds changed", epochs, changes))
    return f'<div class="charts">{"".join(charts)}</div>'


def _rounds(rounds: Sequence[RoundOfRun], threshold: str) -> str:
    states = ("own", "copy", "closed")
    rows: list[list[Any]] = []
    for layer in rounds[-1].layers:
        counts = [int(getattr(layer, state).sum()) for state in states]
        times = sum(len(each.closed[layer.name]) for each in rounds)
        rows.append([layer.name or "(network)", layer.channels, *counts, times])
    rows.append(["total", *map(sum, list(zip(*rows, strict=True))[1:])])
    headings = ("layer", "slots", "read their own channel", "copies", "closed", "times closed, all rounds")
    last = min(len(rounds), _SHOWN) - 1
    return f"""<h2>Channels</h2>
<p>A slot is the part of a kernel that belongs to one input channel. After each round it reads the channel
of its own number, is a copy of another, read at a shifted position, or is closed. A round closes, in every
layer, the channels that matter least: taken in ascending order of their damage, their shares of it together
stay within the threshold ({_text(threshold)}). Closed slots are then filled with copies of the channels
that matter most.</p>
<div class="bar"><label for="round"><span id="told"></span></label>
<input id="round" type="range" min="0" max="{last}" value="{last}">
<div><span class="key"><i class="o"></i> own channel</span><span class="key"><i class="c"></i> copy</span>
<span class="key"><i class="x"></i> closed</span>
<span class="key"><i class="c e"></i> closed by this round</span></div>
<div id="slot" class="muted">Choose a slot to see what it reads.</div></div>
<div id="maps"><noscript>The maps of the channels need JavaScript.</noscript></div>
<h2>Layers after the last round</h2>
{_table(headings, rows)}"""


def _epochs(records: Sequence[Mapping[str, Any]]) -> str:
    keys = list(dict.fromkeys(key for record in records for key in record))
    rows = [[_number(record.get(key)) for key in keys] for record in records]
    return _table([key.replace("_", " ") for key in keys], rows)


def _counts(counts: Sequence[LayerCounts] | str) -> str:
    if isinstance(counts, str):
        return f"<p>{_text(counts)}</p>"
    forms = ("plain", "selective", "compact")
    headings = ["layer", *(f"{what}, {form}" for what in ("parameters", "MACs") for form in forms)]
    rows = []
    for layer in [*counts, total_counts(counts)]:
        each = [getattr(layer, form) for form in forms]
        numbers = [count.parameters for count in each] + [count.multiply_adds for count in each]
        rows.append([layer.path or "(network)", *(f"{number:,}" for number in numbers)])
    return _table(headings, rows)


def _table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    head = "".join(f"<th>{_text(heading)}" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}" for cell in row) for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</thead><tbody>{body}</tbody></table></div>'


def _number(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _data(rounds: Sequence[RoundOfRun], count: int) -> dict[str, Any]:
    """Return what the page's script shows: texts of the rounds, and of each layer the slots after each."""
    layers = [
        {"name": layer.name, "rounds": [_slots(each, index) for each in rounds]}
        for index, layer in enumerate(rounds[-1].layers if rounds else ())
    ]
    texts = [
        f"after step {each.step:,}: {sum(map(len, each.closed.values())):,} slots closed by this round, "
        f"{sum(int(layer.copy.sum()) for layer in each.layers):,} copies, "
        f"{sum(int(layer.closed.sum()) for layer in each.layers):,} closed"
        for each in rounds
    ]
    if len(rounds) < count:
        texts = [f"{text} ({len(rounds)} of {count} rounds are shown)" for text in texts]
    return {"rounds": [{"text": text} for text in texts], "layers": layers}


def _slots(each: RoundOfRun, index: int) -> dict[str, Any]:
    layer = each.layers[index]
    copies = {}
    if layer.source is not None and layer.shift is not None:
        for slot in np.flatnonzero(layer.copy).tolist():
            copies[slot] = [int(layer.source[slot]), *(round(float(part), 2) for part in layer.shift[slot])]
    return {
        "states": "".join(np.select([layer.closed, layer.copy], ["x", "c"], "o").tolist()),
        "copies": copies,
        "closed": list(each.closed[layer.name]),
        "text": f"{layer.channels} slots: {layer.copy.sum()} copies, {layer.closed.sum()} closed",
    }
