"""The tables contain the numbers, fit a terminal and mark the best epoch."""

import io

import numpy as np
import pytest
from rich.console import Console, RenderableType
from rich.table import Table

from selconv_jax.analysis._layer_counts import Count, LayerCounts
from selconv_jax.errors import SelconvError
from selconv_jax.report import LayerAllocation, count_table, layer_table, run_table


def printed(table: RenderableType, width: int = 80) -> list[list[str]]:
    """The printed lines, cut into words."""
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(table)
    return [line.replace("│", " ").split() for line in console.export_text().splitlines()]


def record(epoch: int, accuracy: float, validation: bool = True) -> dict[str, float]:
    validated = {"validation_loss": 3.4567, "validation_accuracy": accuracy} if validation else {}
    return validated | {
        "epoch": epoch,
        "train_loss": 1.2345,
        "train_accuracy": 0.98765,
        "test_loss": 2.3456,
        "test_accuracy": 1 - accuracy,
        "test_top5": 0.91239,
        "learning_rate": 0.05,
        "images_per_second": 12345.6,
        "open_channels": 12000,
        "copies": 1500,
        "channels": 13000,
    }


@pytest.mark.parametrize("validation", [True, False])
def test_every_number_fits_eighty_characters(validation):
    records = [record(epoch, epoch * 0.71234 / 300, validation) for epoch in range(1, 301)]
    lines = printed(run_table(records, {"model": "densenet40"}))
    assert ["model", "densenet40"] in lines
    expected = [
        "300",
        "1.234",
        "98.77",
        *(["3.457", "71.23"] if validation else []),
        "2.346",
        "28.77",
        *([] if validation else ["91.24"]),
        "0.0500",
        "12,000",
        "1,500",
        "12,346",
        *(["best"] if validation else []),
    ]
    assert expected in lines


def test_first_best_and_last_epochs():
    records = [record(epoch, 0.9 if epoch in (4, 7) else 0.5) for epoch in range(1, 21)]
    lines = printed(run_table(records, {}))
    shown = [line[0] for line in lines if line and (line[0].isdigit() or line[0] == "...")]
    assert shown == ["1", "...", "4", "...", "16", "17", "18", "19", "20"]
    assert [line[0] for line in lines if "best" in line] == ["4"], "the earliest of equals is the best"
    assert ["best:", "the", "highest", "accuracy", "on", "the", "validation", "images"] in lines


def test_dots_stand_for_more_than_one_epoch():
    lines = printed(run_table([record(epoch, 0.5, validation=False) for epoch in range(1, 8)], {}))
    shown = [line[0] for line in lines if line and (line[0].isdigit() or line[0] == "...")]
    assert shown == ["1", "2", "3", "4", "5", "6", "7"]


def test_no_epoch_is_chosen_by_test_accuracy():
    lines = printed(run_table([{"epoch": 1, "test_accuracy": 0.5}, {"epoch": 2, "test_accuracy": 0.25}], {}))
    assert ["1", "50.00"] in lines
    assert not [line for line in lines if "best" in line or "best:" in line or "val." in line]


@pytest.mark.parametrize("epochs", [1, 2, 5, 6])
def test_few_epochs_are_shown_once_each(epochs):
    lines = printed(run_table([record(epoch, epoch / 10) for epoch in range(1, epochs + 1)], {}))
    assert [line[0] for line in lines if line and line[0].isdigit()] == [str(e) for e in range(1, epochs + 1)]
    assert not [line for line in lines if "..." in line]


def test_no_best_epoch_is_claimed_where_a_record_is_lost():
    lines = printed(run_table([record(1, 0.25), record(2, 0.75), record(4, 0.5)], {}))
    assert [line[0] for line in lines if line and line[0].isdigit()] == ["1", "2", "4"]
    assert not [line for line in lines if "best" in line or "best:" in line]
    assert not [line for line in lines if "top" in line], "too wide beside the validation accuracy"


def test_best_row_is_bold():
    group = run_table([record(1, 0.25), record(2, 0.75), record(3, 0.5)], {})
    epochs = group.renderables[1]
    assert isinstance(epochs, Table)
    assert [row.style for row in epochs.rows] == [None, "bold", None]


def test_what_nobody_logged_has_no_column():
    lines = printed(run_table([{"epoch": 1, "train_loss": 0.5}, {"epoch": 2, "test_loss": 0.25}], {}))
    assert ["1", "0.500"] in lines
    assert ["2", "0.250"] in lines
    assert not [line for line in lines if "copies" in line or "best" in line]


def test_no_epoch_yet():
    with pytest.raises(SelconvError, match="train at least one epoch"):
        run_table([], {})


def test_layer_table():
    source = np.full(1200, -1, np.int32)
    source[[3, 4, 5, 6]] = [9, 2, 9, 2]  # a tie: the lowest channel is named
    gate = np.ones(1200, bool)
    gate[7] = False
    layers = [
        LayerAllocation("wide", gate, source, np.ones((1200, 2)), None, 8),
        LayerAllocation("single", np.ones(2, bool), np.array([1, -1]), np.ones((2, 2)), None, 8),
        LayerAllocation("plain", np.ones(2, bool), np.array([-1, -1]), np.ones((2, 2)), None, 8),
        LayerAllocation("closing", np.array([True, False]), None, None, None, 8),
    ]
    lines = printed(layer_table(layers))
    assert ["wide", "1,200", "1,199", "4", "1", "2", "(2", "copies)"] in lines
    assert ["single", "2", "2", "1", "0", "1", "(1", "copy)"] in lines
    assert ["plain", "2", "2", "0", "0"] in lines
    assert ["closing", "2", "1", "0", "1", "gate-only"] in lines
    assert ["total", "1,206", "1,204", "5", "2"] in lines


def test_long_names_lose_no_letter():
    name = "DenseNet_0/DenseBlock_2/DenseLayer_11/SelectiveConv_1"
    layer = LayerAllocation(name, np.ones(2, bool), None, None, None, 8)
    assert name in "".join(line[0] for line in printed(layer_table([layer]), 60) if line)


def test_brackets_are_no_markup():
    layer = LayerAllocation("conv[bold]", np.ones(2, bool), None, None, None, 8)
    assert "conv[bold]" in [line[0] for line in printed(layer_table([layer])) if line]
    assert ["data[red]", "[true]"] in printed(run_table([record(1, 0.5)], {"data[red]": "[true]"}))


def test_no_layers():
    assert layer_table([]).row_count == 0


def test_count_table():
    layers = [
        LayerCounts(
            "block1_layer12/conv1",
            Count(33_751_370, 4_900_726_784),
            Count(33_781_706, 5_285_538_816),
            Count(25_322_446, 3_676_438_528),
        ),
        LayerCounts("", Count(0, 2_000), Count(0, 2_000), Count(0, 0)),
    ]
    lines = printed(count_table(layers, "of [bold]"))
    assert ["of", "[bold]"] in lines
    numbers = ["33,751,370", "33,781,706", "25,322,446", "4,900.727", "5,285.539", "3,676.439"]
    (row,) = [line for line in lines if line and line[0].startswith("block1_layer")]
    assert row[1:] == numbers
    assert ["(network)", "0", "0", "0", "0.002", "0.002", "0.000"] in lines
    assert ["total", *numbers[:3], "4,900.729", "5,285.541", "3,676.439"] in lines
    plain = printed(count_table(layers, "", ("plain",)))
    assert ["total", "33,751,370", "4,900.729"] in plain
    assert not [line for line in plain if "selective" in line or "compact" in line]
