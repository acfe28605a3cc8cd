"""The record of an epoch: numbers for the file, a line of text for the terminal."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import traverse_util

from selconv_jax.data._dataset import DatasetInfo
from selconv_jax.train._program import Program
from selconv_jax.train._state import TrainState
from selconv_jax.train._trainer import Trainer

__all__ = ["channel_counts", "evaluation_metrics", "sentence"]


def evaluation_metrics(
    trainer: Trainer,
    state: TrainState,
    program: Program,
    info: DatasetInfo,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Evaluate a state on all validation images, if there are any, and on all test images.

    Args:
        trainer: The trainer of the run.
        state: The state to evaluate.
        program: The program that computes it.
        info: The facts of the images.
        should_stop: Called between batches.

    Returns:
        test_loss, test_accuracy and, with more than five classes, test_top5; before them the same for
        ``validation``, if there are validation images. None if it was asked to stop.
    """
    metrics = {}
    for split in ("validation", "test") if trainer.config.data.has_validation else ("test",):
        totals = trainer.evaluate(state, should_stop, program, split)
        if totals is None:
            return None
        count = int(totals.count)
        metrics[f"{split}_loss"] = float(totals.loss) / count
        metrics[f"{split}_accuracy"] = int(totals.correct) / count
        if info.num_classes > 5:
            metrics[f"{split}_top5"] = int(totals.correct_top5) / count
    return metrics


def channel_counts(state: TrainState) -> dict[str, int]:
    """Count the channels of all selective and gate-only layers, and those that are open or copies."""
    if not state.selectivity:
        return {"open_channels": 0, "copies": 0, "channels": 0}
    allocation = traverse_util.flatten_dict(jax.device_get(state.selectivity))
    gates = [leaf for path, leaf in allocation.items() if path[-1] == "gate"]
    return {
        "open_channels": sum(int(gate.sum()) for gate in gates),
        "copies": sum(int((leaf >= 0).sum()) for path, leaf in allocation.items() if path[-1] == "source"),
        "channels": sum(gate.size for gate in gates),
    }


def sentence(record: Mapping[str, Any], epochs: int) -> str:
    """Format a record as one line of text.

    Args:
        record: Of an epoch, as it is written to the file.
        epochs: Of the run.
    """
    parts = [
        f"epoch {record['epoch']}/{epochs}",
        *(
            f"{split} loss {record[f'{split}_loss']:.4f}, accuracy {record[f'{split}_accuracy']:.2%}"
            for split in ("train", "validation", "test")
            if f"{split}_loss" in record
        ),
    ]
    if record["images_per_second"]:
        parts.append(f"{record['images_per_second']:,.0f} images/s")
    if record["deallocated"] or record["reallocated"]:
        parts.append(f"de-allocated {record['deallocated']}, re-allocated {record['reallocated']} channels")
    return "  ".join(parts)
