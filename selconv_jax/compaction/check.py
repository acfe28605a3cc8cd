"""Whether a network's own code does with fewer channels what it did with all of them."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from selconv_jax.compaction.flow import Flow, channel_flow
from selconv_jax.compaction.liveness import Kept
from selconv_jax.compaction.trace import Trace, trace_network

__all__ = ["joins_the_same", "trains_alike"]


def joins_the_same(
    small_model: nn.Module, small_variables: Any, example: Any, whole: Trace, flow: Flow, kept: Kept
) -> bool:
    """Whether each layer of the smaller network reads the very channels that are left of the whole one's.

    Code that is tied to numbers of channels, such as a padding by a number that is written down, fails to
    run, or joins and adds other channels, or computes with other numbers.

    Args:
        small_model: The smaller network.
        small_variables: Its variables, or their shapes.
        example: An input, or its shape.
        whole: Trace of the whole network.
        flow: Its flow.
        kept: What is left of it.

    Returns:
        Whether the two compute alike.
    """
    try:
        small = trace_network(small_model, small_variables, example)
    except Exception:  # whatever a user's code raises that counts on its number of channels
        return False
    if jax.tree.map(_type, small.output) != jax.tree.map(_type, whole.output):
        return False
    narrow = channel_flow(small.program)
    if narrow.signature != flow.signature:
        return False
    names = {
        path: [flow.labels[number] for number in ids[kept.outputs[path]]]
        for path, ids in flow.outputs.items()
    }
    for path, ids in flow.inputs.items():
        expected = [flow.labels[number] for number in ids[kept.inputs[path]]]
        actual = [_label(narrow.labels[number], names) for number in narrow.inputs[path]]
        if kept.outputs[path].any() and actual != expected:
            return False
    return True


def _label(label: tuple[Any, ...], names: Mapping[str, list[tuple[Any, ...]]]) -> tuple[Any, ...]:
    """The label in the whole network of a channel in the smaller one."""
    kind, origin, position = label
    return names[origin][position] if kind == "made by" and origin in names else label


def trains_alike(
    model: nn.Module, variables: Any, small_model: nn.Module, small_variables: Any, example: Any
) -> bool:
    """Whether the smaller network also runs in training, where the whole one does.

    Args:
        model: The whole network.
        variables: Shapes of its variables.
        small_model: The smaller network.
        small_variables: Shapes of its variables.
        example: Shape of an input.

    Returns:
        False if the smaller network fails, or returns something of another kind.
    """

    def types(model: nn.Module, variables: Any) -> Any:
        apply: Callable[..., Any] = model.apply

        def run(variables: Any, example: Any, key: jax.Array) -> Any:
            return apply(variables, example, train=True, mutable=True, rngs={"dropout": key})[0]

        key = jax.eval_shape(lambda: jax.random.key(0))
        return jax.tree.map(_type, jax.eval_shape(run, variables, example, key))

    try:
        expected = types(model, variables)
    except Exception:  # it wants to be trained in another way, which is not known
        return True
    try:
        return bool(types(small_model, small_variables) == expected)
    except Exception:
        return False


def _type(leaf: Any) -> tuple[Any, Any]:
    return leaf.shape, leaf.dtype
