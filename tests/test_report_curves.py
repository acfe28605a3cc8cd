"""Learning curves: what is drawn equals what was logged."""

import numpy as np
import pytest

from selconv_jax.errors import SelconvError
from selconv_jax.report import learning_curves
from selconv_jax.report._statistics import best_index, last_change, series, with_gaps


def log(epochs: int, last_round: int, top5: bool = False) -> list[dict[str, float]]:
    """A run of ten channels that closes two and copies one per round."""
    records = []
    for epoch in range(1, epochs + 1):
        rounds = min(epoch, last_round)
        records.append(
            {
                "epoch": epoch,
                "train_loss": 2.0 / epoch,
                "train_accuracy": 1 - 1 / (epoch + 1),
                "test_loss": 2.5 / epoch,
                "validation_loss": 3.0 / epoch,
                "validation_accuracy": [0.25, 0.875, 0.875, 0.5][epoch % 4],
                "test_accuracy": [0.5, 0.75, 0.75, 0.625][epoch % 4],
                "learning_rate": 0.1 / epoch,
                "images_per_second": 1000.0,
                "deallocated": 2 if epoch <= last_round else 0,
                "reallocated": 1 if epoch <= last_round else 0,
                "open_channels": 10 - rounds,
                "copies": rounds,
                "channels": 10,
            }
            | ({"test_top5": 0.9} if top5 else {})
        )
    return records


def lines(axes) -> dict[str, np.ndarray]:
    return {line.get_label(): np.asarray(line.get_xydata()) for line in axes.get_lines()}


def legend(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_panels_and_values():
    figure = learning_curves(log(6, 3, top5=True), "my run")
    assert figure.get_suptitle() == "my run"
    loss, accuracy, states, changes, rate, speed = figure.axes

    np.testing.assert_array_equal(lines(loss)["train"], [[e, 2.0 / e] for e in range(1, 7)])
    np.testing.assert_array_equal(lines(loss)["test"], [[e, 2.5 / e] for e in range(1, 7)])
    np.testing.assert_array_equal(lines(loss)["validation"], [[e, 3.0 / e] for e in range(1, 7)])
    np.testing.assert_allclose(lines(accuracy)["validation"][:, 1], [87.5, 87.5, 50, 25, 87.5, 87.5])
    np.testing.assert_allclose(lines(accuracy)["test"][:, 1], [75, 75, 62.5, 50, 75, 75])
    np.testing.assert_allclose(lines(accuracy)["test top 5"][:, 1], [90.0] * 6)
    np.testing.assert_allclose(
        [line.get_ydata() for line in rate.get_lines()], [[0.1 / e for e in range(1, 7)]]
    )
    np.testing.assert_allclose([line.get_ydata() for line in speed.get_lines()], [[1000.0] * 6])

    own, copy, closed = states.containers
    np.testing.assert_allclose([bar.get_height() for bar in own], [80, 60, 40, 40, 40, 40])
    np.testing.assert_allclose([bar.get_height() for bar in copy], [10, 20, 30, 30, 30, 30])
    np.testing.assert_allclose([bar.get_height() for bar in closed], [10, 20, 30, 30, 30, 30])
    np.testing.assert_allclose([bar.get_y() for bar in closed], [90, 80, 70, 70, 70, 70])
    np.testing.assert_allclose([bar.get_height() for bar in changes.containers[0]], [2, 2, 2, 0, 0, 0])
    np.testing.assert_allclose([bar.get_height() for bar in changes.containers[1]], [1, 1, 1, 0, 0, 0])
    assert "10 channels" in states.get_title("left")


def test_best_epoch_is_marked_the_earliest_of_equals():
    records = log(6, 3)
    assert best_index(records) == 0
    records = [r | {"validation_accuracy": 0.5} if r["epoch"] < 5 else r for r in records]
    accuracy = learning_curves(records, "run").axes[1]
    assert legend(accuracy) == ["train", "validation", "test", "best"]
    assert accuracy.get_title("left") == "Accuracy (best on validation: 87.50 %, epoch 5)"
    np.testing.assert_allclose(lines(accuracy)["best"], [[5, 87.5]])


@pytest.mark.parametrize("lost", [1, 4])
def test_no_best_epoch_is_claimed_where_a_record_is_lost(lost):
    records = [r for r in log(6, 3) if r["epoch"] != lost]
    assert best_index(records) is best_index(with_gaps(records)) is None
    accuracy = learning_curves(records, "run").axes[1]
    assert legend(accuracy) == ["train", "validation", "test"]
    assert accuracy.get_title("left") == "Accuracy"


def test_test_accuracy_chooses_no_epoch():
    without = [{key: value for key, value in r.items() if "validation" not in key} for r in log(6, 3)]
    assert best_index(without) is None
    accuracy = learning_curves(without, "run").axes[1]
    assert legend(accuracy) == ["train", "test"]


def test_freeze_is_marked_where_it_happened():
    records = log(6, 3)
    assert last_change(records) == 3
    _, _, states, changes, *_ = learning_curves(records, "run").axes
    for axes in (states, changes):
        assert legend(axes)[-1] == "unchanged after epoch 3"
        np.testing.assert_allclose(lines(axes)["unchanged after epoch 3"][:, 0], 3.5)
    # Epochs without a round may also leave the keys out or null.
    without = [
        {key: value for key, value in r.items() if key != "closed"} | {"reallocated": None}
        for r in records[3:]
    ]
    assert last_change(records[:3] + without) == 3


def test_no_freeze_is_claimed_across_lost_epochs():
    records = log(8, 3)
    earlier, later = [records[0], *records[2:]], [*records[:4], *records[5:]]
    assert last_change(earlier) == last_change(with_gaps(earlier)) == 3
    assert last_change(later) is last_change(with_gaps(later)) is None
    assert "unchanged after epoch 3" in legend(learning_curves(earlier, "run").axes[2])
    assert "unchanged after epoch 3" not in legend(learning_curves(later, "run").axes[2])


@pytest.mark.parametrize(("epochs", "last_round"), [(3, 3), (4, 0), (1, 1)])
def test_no_freeze_is_claimed_before_it_is_known(epochs, last_round):
    records = log(epochs, last_round)
    assert last_change(records) is None
    for axes in learning_curves(records, "run").axes[2:4]:
        assert not [text for text in legend(axes) if text.startswith("unchanged")]


def test_plain_model_has_no_allocation_panels():
    keys = ("deallocated", "reallocated", "open_channels", "copies", "channels")
    records = [{key: value for key, value in record.items() if key not in keys} for record in log(3, 0)]
    figure = learning_curves(records, "run")
    assert [axes.get_title("left") for axes in figure.axes] == [
        "Loss",
        "Accuracy (best on validation: 87.50 %, epoch 1)",
        "Learning rate",
        "Training speed",
    ]
    zero = [record | dict.fromkeys(keys, 0) for record in records]
    assert len(learning_curves(zero, "run").axes) == 4


def test_gate_only_model_logs_no_copies():
    records = [record | {"copies": None} for record in log(2, 2)]
    own, closed = learning_curves(records, "run").axes[2].containers  # and no legend of what is absent
    np.testing.assert_allclose([bar.get_height() for bar in own], [90, 80])
    np.testing.assert_allclose([bar.get_height() for bar in closed], [10, 20])


def test_one_epoch_is_a_marker():
    figure = learning_curves(log(1, 1), "run")
    for axes in (figure.axes[0], figure.axes[4]):
        for line in axes.get_lines():
            assert line.get_marker() == "o"
            assert len(line.get_xydata()) == 1


def test_gaps_and_infinities():
    records = [{"epoch": 1, "train_loss": float("inf")}, {"epoch": 2, "train_loss": 1.0}, {"epoch": 3}]
    np.testing.assert_array_equal(series(records, "train_loss"), [np.nan, 1.0, np.nan])
    figure = learning_curves(records, "run")
    assert list(lines(figure.axes[0])) == ["train"], "a quantity nobody logged is drawn"
    assert best_index(records) is None
    assert not figure.axes[1].get_lines()


def test_lost_epochs_break_the_lines():
    records = [{"epoch": epoch, "train_loss": 1.0} for epoch in (1, 2, 5)]
    (line,) = learning_curves(records, "run").axes[0].get_lines()
    np.testing.assert_array_equal(line.get_xydata()[:, 0], [1, 2, 3, 4, 5])
    np.testing.assert_array_equal(line.get_xydata()[:, 1], [1, 1, np.nan, np.nan, 1])


def test_epochs_that_stand_alone_are_markers_in_long_runs_too():
    records = [{"epoch": epoch, "train_loss": 1.0} for epoch in (*range(1, 50), 60)]
    (line,) = learning_curves(records, "run").axes[0].get_lines()
    np.testing.assert_array_equal(np.flatnonzero(line.get_markevery()), [59])


def test_no_epoch_yet():
    with pytest.raises(SelconvError, match="train at least one epoch"):
        learning_curves([], "run")
