"""Proof that the smaller network computes the same: its traced programs, then numbers."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from flax.core import unfreeze

from selconv_jax.compaction._flow import Flow, channel_flow
from selconv_jax.compaction._liveness import Kept
from selconv_jax.compaction._network import Compact, NetworkCall, intercept_calls
from selconv_jax.compaction._plan import CompactionPlan
from selconv_jax.compaction._trace import Trace, without_dropout

__all__ = ["joins_the_same", "random_case", "same_numbers"]


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


Case = tuple[Any, tuple[Any, ...]]  # variables and inputs

_BATCH = 2


def random_case(
    whole: Compact, variables: Mapping[str, Any], call: NetworkCall, layers: Iterable[str]
) -> Case:
    """Variables and a small batch on which two networks of the same function compute the same.

    Layers get random parameters and statistics in the place of theirs, so that no channel counts little by
    chance; so do variables without values, and those that are zeros.

    Args:
        whole: The network.
        variables: Its variables, or their shapes; gates and sources have values.
        call: How it is called.
        layers: Paths of its layers.

    Returns:
        Variables and inputs, on the host.
    """
    rng = np.random.default_rng(0)
    random = {tuple(path.split("/")) if path else () for path in layers}
    flat = traverse_util.flatten_dict(unfreeze(dict(variables)), keep_empty_nodes=True)
    values = {
        path: _variable(path, leaf, path[1:-1] in random, rng) if hasattr(leaf, "shape") else leaf
        for path, leaf in flat.items()
    }
    case = traverse_util.unflatten_dict(values)
    for shapes in (_with_batch(call.inputs, _BATCH), call.inputs):
        try:
            jax.eval_shape(lambda v, x: call.run(whole, v, x, call.modes[0]), case, shapes)
            break
        except Exception:  # whatever a user's code raises that counts on its number of images
            continue
    return case, jax.tree.map(lambda leaf: _normal(leaf, rng), shapes)


def same_numbers(whole: Compact, plan: CompactionPlan, case: Case, call: NetworkCall, step: float) -> bool:
    """Whether a network and its smaller one return the same, but for rounding, in all modes.

    Args:
        whole: The network.
        plan: The smaller one.
        case: From `random_case`.
        call: How they are called.
        step: From `trace.coarsest_step`.

    Returns:
        The answer. True, too, if the case cannot tell: the whole network's numbers are not finite, or differ
        as much when its input differs by little.

    Raises:
        Exception: Whatever the whole network raises.
    """
    variables, inputs = case
    run = _compiled(whole, lambda variables: variables, call)
    expected = run(variables, inputs)
    try:
        actual = _compiled(plan.model, plan.take, call)(variables, inputs)
    except Exception:  # whatever a user's code raises that counts on its number of channels
        return False
    difference = _difference(actual, expected, step)
    if difference <= 1.0:
        return True
    nearby = jax.tree.map(lambda leaf: _nudged(leaf, step), inputs)
    return difference <= 10 * _difference(run(variables, nearby), expected, step)


def _compiled(model: Compact, take: Callable[..., Any], call: NetworkCall) -> Callable[..., Any]:
    """What a network returns in all modes, as a function of the whole one's variables; on the host."""

    def run(variables: Any, inputs: Any) -> Any:
        small = take(variables)
        with intercept_calls(without_dropout):
            return [call.run(model, small, inputs, train)[0] for train in call.modes]

    compiled: Any = None

    def on_host(variables: Any, inputs: Any) -> Any:
        nonlocal compiled
        if compiled is None:
            # Quickly, as it runs once or twice.
            options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
            with jax.default_matmul_precision("highest"):
                compiled = jax.jit(run).lower(variables, inputs).compile(compiler_options=options)
        return jax.device_get(compiled(variables, inputs))

    return on_host


def _difference(actual: Any, expected: Any, step: float) -> float:
    """The largest difference of two results, in units of what rounding may make of it."""
    largest = 0.0
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        if one.shape != other.shape:
            return np.inf
        if not one.size or jnp.issubdtype(one.dtype, jnp.complexfloating):
            continue
        if not jnp.issubdtype(one.dtype, jnp.floating):  # such as predicted classes, where a tie may turn
            largest = max(largest, 100 * float(np.mean(one != other)))
            continue
        here, there = one.astype(np.float64), other.astype(np.float64)
        if not np.isfinite(there).all():
            continue
        allowed = 3 * np.sqrt(step) * np.abs(there).max() + 1e-6
        largest = max(largest, float(np.nan_to_num(np.abs(here - there).max() / allowed, nan=np.inf)))
    return largest


def _nudged(leaf: Any, step: float) -> Any:
    """An input that differs by some of these steps."""
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    return (leaf.astype(np.float64) * (1 + 8 * step)).astype(leaf.dtype)


def _variable(path: tuple[str, ...], leaf: Any, is_layers: bool, rng: np.random.Generator) -> Any:
    has_value = not isinstance(leaf, jax.ShapeDtypeStruct | jax.core.Tracer) and (
        not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated
    )
    is_number = jnp.issubdtype(leaf.dtype, jnp.floating)
    if has_value and (path[0] == "selectivity" or not is_number):
        return jax.device_get(leaf)
    if has_value and not is_layers and np.any(value := jax.device_get(leaf)):
        return value
    if not is_number:
        return np.zeros(leaf.shape, leaf.dtype)
    values = rng.normal(size=leaf.shape)
    if path[-1] == "kernel":
        values *= np.sqrt(2 / max(np.prod(leaf.shape[:-1]), 1))
    elif path[-1] in ("scale", "var"):
        values = rng.uniform(0.5, 1.5, size=leaf.shape)
    else:
        values *= 0.5
    return values.astype(leaf.dtype)


def _with_batch(inputs: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    """The inputs with another number of images, where all have one."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape[1:]), leaf.dtype), inputs)


def _normal(leaf: Any, rng: np.random.Generator) -> Any:
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return rng.normal(size=leaf.shape).astype(leaf.dtype)
    return rng.integers(2, size=leaf.shape).astype(leaf.dtype)
