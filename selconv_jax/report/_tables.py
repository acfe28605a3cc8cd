"""Tables of a run and its layers for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from selconv_jax.analysis._layer_counts import LayerCounts, total_counts
from selconv_jax.report._layer_allocation import LayerAllocation
from selconv_jax.report._statistics import best_index, require_records, series

_LAST = 5  # epochs shown at the end
# key in the records, heading, format of a value
_COLUMNS = (
    ("train_loss", "train\nloss", "{:.3f}"),
    ("train_accuracy", "train\nacc. %", "{:.2f}"),
    ("validation_loss", "val.\nloss", "{:.3f}"),
    ("validation_accuracy", "val.\nacc. %", "{:.2f}"),
    ("test_loss", "test\nloss", "{:.3f}"),
    ("test_accuracy", "test\nacc. %", "{:.2f}"),
    ("test_top5", "test\ntop 5", "{:.2f}"),
    ("learning_rate", "\nrate", "{:.4f}"),
    ("open_channels", "\nopen", "{:,.0f}"),
    ("copies", "\ncopies", "{:,.0f}"),
    ("images_per_second", "images\nper s", "{:,.0f}"),
)
_PERCENT = ("train_accuracy", "validation_accuracy", "test_accuracy", "test_top5")


def run_table(records: Sequence[Mapping[str, Any]], summary: Mapping[str, str]) -> Group:
    """Tabulate the facts of a run and its epochs: the first, the best and the last five.

    Columns that no record has are left out, and the other epochs are replaced by a row of dots. The epoch
    of the best validation accuracy (the earliest among equals) is bold and marked; a run without validation
    images, or with a lost record, has none. With validation images, the top-5 accuracy has no column.

    Args:
        records: The lines of ``metrics.jsonl``, one per epoch, in order.
        summary: Facts of the run by heading, such as model, data set and seed.

    Returns:
        Two tables for ``rich.print``: the facts, the epochs.

    Raises:
        SelconvError: ``records`` is empty.

    Example:
        >>> from selconv_jax.report import run_table
        >>> group = run_table([{"epoch": 1, "test_accuracy": 0.5}], {"model": "densenet40"})
        >>> len(group.renderables)
        2
    """
    require_records(records)
    facts = Table(box=None, show_header=False)
    facts.add_column(style="bold")
    facts.add_column()
    for heading, value in summary.items():
        facts.add_row(Text(heading), Text(value))

    # Narrow, so that all columns fit a terminal of 80 characters.
    best, validated = best_index(records), not np.isnan(series(records, "validation_accuracy")).all()
    note = None if best is None else "best: the highest accuracy on the validation images"
    epochs = Table(box=box.SIMPLE_HEAD, padding=0, caption=note, caption_justify="left")
    epochs.add_column("\nepoch", justify="right")
    columns = []
    for key, heading, form in _COLUMNS:
        if key == "test_top5" and validated:
            continue  # all columns would not fit
        values = series(records, key) * (100 if key in _PERCENT else 1)
        if not np.isnan(values).all():
            epochs.add_column(heading, justify="right")
            columns.append(["" if np.isnan(value) else form.format(value) for value in values])
    epochs.add_column("")

    shown = {0, *range(max(0, len(records) - _LAST), len(records))}
    if best is not None:
        shown.add(best)
    # Dots in place of a single epoch would save no line.
    shown |= {index for index in range(1, len(records) - 1) if {index - 1, index + 1} <= shown}
    previous = -1
    for index in sorted(shown):
        if index > previous + 1:
            epochs.add_row(*["..."] * (1 + len(columns)))
        cells = [str(records[index]["epoch"]), *(column[index] for column in columns)]
        if index == best:
            epochs.add_row(*cells, "best", style="bold")
        else:
            epochs.add_row(*cells)
        previous = index
    return Group(facts, epochs)


def layer_table(layers: Sequence[LayerAllocation]) -> Table:
    """Tabulate the allocation of every layer, in forward order, with totals, for ``rich.print``.

    Columns are channels, open ones, copies among these, closed ones, and the channel with the most copies
    (the lowest among equals).

    Example:
        >>> import numpy as np
        >>> from selconv_jax.report import LayerAllocation, layer_table
        >>> layer_table([LayerAllocation("conv", np.ones(4, bool), None, None, None, 8)]).row_count
        1
    """
    rows = [
        (layer.channels, *(int(state.sum()) for state in (layer.gate, layer.copy, layer.closed)))
        for layer in layers
    ]
    totals = [f"{sum(column):,}" for column in zip(*rows, strict=True)] or [""] * 4
    table = Table(show_footer=True)
    table.add_column("layer", "total", overflow="fold")
    for heading, total in zip(("channels", "open", "of them\ncopies", "closed"), totals, strict=True):
        table.add_column(heading, total, justify="right")
    table.add_column("most copied\nchannel")
    for layer, counts in zip(layers, rows, strict=True):
        most = "gate-only" if layer.source is None else ""
        for source, slots in list(layer.copies_of.items())[:1]:
            most = f"{source} ({slots.size:,} {'copy' if slots.size == 1 else 'copies'})"
        table.add_row(Text(layer.name), *(f"{count:,}" for count in counts), most)
    return table


def count_table(
    layers: Sequence[LayerCounts], title: str, forms: Sequence[str] = ("plain", "selective", "compact")
) -> Table:
    """Tabulate the trainable parameters and multiply-adds (MACs) of every layer, with totals.

    Args:
        layers: From `selconv_jax.analysis.count_layers`.
        title: Title of the table.
        forms: Forms that have columns, of ``"plain"``, ``"selective"`` and ``"compact"``.

    Example:
        >>> from selconv_jax.analysis import Count, LayerCounts
        >>> from selconv_jax.report import count_table
        >>> conv = LayerCounts("conv", Count(292, 18_432), Count(300, 18_432), Count(148, 9_216))
        >>> count_table([conv], "per image").row_count
        1
    """
    # Narrow, so that all columns fit a terminal of 80 characters.
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_footer=True, title_justify="left")
    table.title = Text(title, "table.title")

    def numbers(row: LayerCounts) -> list[str]:
        counts = [getattr(row, form) for form in forms]
        parameters = [f"{count.parameters:,}" for count in counts]
        return parameters + [f"{count.multiply_adds / 1e6:,.3f}" for count in counts]

    total = total_counts(layers)
    table.add_column("\n\nlayer", total.path, overflow="fold")
    headings = [f"{count}\n{form}" for count in ("para-\nmeters", "multiply-\nadds (M)") for form in forms]
    for heading, number in zip(headings, numbers(total), strict=True):
        table.add_column(heading, number, justify="right")
    for layer in layers:
        table.add_row(Text(layer.path or "(network)"), *numbers(layer))
    return table
