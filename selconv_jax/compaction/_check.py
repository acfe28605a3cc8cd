"""Whether a network's own code does with fewer channels what it did with all of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from selconv_jax.compaction._flow import Flow, channel_flow
from selconv_jax.compaction._liveness import Kept
from selconv_jax.compaction._trace import Trace

__all__ = ["joins_the_same"]


def joins_the_same(small: Sequence[Trace], whole: Sequence[Trace], flow: Flow, kept: Kept) -> bool:
    """Whether each array of the smaller network holds the very channels that are left of the whole one's.

    Code that is tied to numbers of channels, such as a padding by a number that is written down, joins and
    adds other channels, or computes with other numbers.

    Args:
        small: The smaller network in all its modes.
        whole: The whole network in the same modes.
        flow: The flow of the whole network.
        kept: What is left of it.

    Returns:
        Whether the two compute alike.
    """
    for one, other in zip(small, whole, strict=True):
        if jax.tree.map(_type, one.output) != jax.tree.map(_type, other.output):
            return False
    narrow = channel_flow(small)
    if narrow.signature != flow.signature or len(narrow.arrays) != len(flow.arrays):
        return False
    numbers = {label: number for number, label in enumerate(dict.fromkeys(flow.labels))}
    names = {
        path: [flow.labels[number] for number in ids[kept.outputs[path]]]
        for path, ids in flow.outputs.items()
        if path in kept.outputs
    }
    expected = np.array([numbers[label] for label in flow.labels], np.int64)
    actual = np.array([numbers.get(_label(label, names), -1) for label in narrow.labels], np.int64)
    return all(
        np.array_equal(actual[here], expected[there[kept.live[there]]])
        for here, there in zip(narrow.arrays, flow.arrays, strict=True)
    )


def _label(label: tuple[Any, ...], names: Mapping[str, list[tuple[Any, ...]]]) -> tuple[Any, ...]:
    """The label in the whole network of a channel in the smaller one; empty: it has no such channel."""
    kind, origin, position = label
    if kind != "made by" or origin not in names:
        return label
    return names[origin][position] if position < len(names[origin]) else ()


def _type(leaf: Any) -> tuple[Any, Any]:
    return leaf.shape, leaf.dtype
