"""The record of an epoch: numbers for the file, a sentence for the terminal."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import traverse_util

from selconv_jax.data.dataset import DatasetInfo
from selconv_jax.train.state import Totals, TrainState

__all__ = ["channel_counts", "evaluation_metrics", "sentence"]


def evaluation_metrics(totals: Totals, info: DatasetInfo) -> dict[str, float]:
    """The numbers of an evaluation: test_loss, test_accuracy and, of more than five classes, test_top5."""
    count = int(totals.count)
    metrics = {"test_loss": float(totals.loss) / count, "test_accuracy": int(totals.correct) / count}
    if info.num_classes > 5:
        metrics["test_top5"] = int(totals.correct_top5) / count
    return metrics


def channel_counts(state: TrainState) -> dict[str, int]:
    """Channels of all selective and gate-only layers, and how many are open or copies."""
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
    """A record for people.

    Args:
        record: Of an epoch, as it is written to the file.
        epochs: Of the run.
    """
    parts = [
        f"epoch {record['epoch']}/{epochs}",
        f"train loss {record['train_loss']:.4f}, accuracy {record['train_accuracy']:.2%}",
        f"test loss {record['test_loss']:.4f}, accuracy {record['test_accuracy']:.2%}",
    ]
    if record["images_per_second"]:
        parts.append(f"{record['images_per_second']:,.0f} images/s")
    if record["closed"] or record["reallocated"]:
        parts.append(f"closed {record['closed']}, re-allocated {record['reallocated']} channels")
    return "  ".join(parts)
