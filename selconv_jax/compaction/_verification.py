"""Verification that a smaller network computes the same: by its traced programs, then by its outputs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from flax.core import unfreeze

from selconv_jax.compaction._flow import Flow, channel_flow
from selconv_jax.compaction._liveness import Kept
from selconv_jax.compaction._network import Compact, NetworkCall, path_parts
from selconv_jax.compaction._trace import Trace, without_dropout
from selconv_jax.nn._interception import intercept_calls


def joins_the_same(small: Sequence[Trace], whole: Sequence[Trace], flow: Flow, kept: Kept) -> bool:
    """Check that each array of the smaller network holds exactly the kept channels of the whole one's.

    Code that depends on a number of channels, such as a padding of hard-coded width, would combine other
    channels or compute with other numbers. Both are traced in the same modes; the flow is the whole one's.
    """

    def types(traces: Sequence[Trace]) -> Any:
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), [trace.output for trace in traces])

    if types(small) != types(whole):
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

    def number_of(label: tuple[Any, ...]) -> int:
        """Return the number in the whole network of a channel of the smaller one; -1: it has none."""
        kind, origin, position = label
        if kind == "made by" and origin in names:
            label = names[origin][position] if position < len(names[origin]) else ()
        return numbers.get(label, -1)

    expected = np.array([numbers[label] for label in flow.labels], np.int64)
    actual = np.array([number_of(label) for label in narrow.labels], np.int64)
    return all(
        np.array_equal(actual[here], expected[there[kept.live[there]]])
        for here, there in zip(narrow.arrays, flow.arrays, strict=True)
    )


Case = tuple[Any, tuple[Any, ...]]  # variables and inputs

_BATCH = 2


def random_case(
    whole: Compact, variables: Mapping[str, Any], call: NetworkCall, layers: Iterable[str]
) -> Case:
    """Create variables and a small batch, on the host, for comparing two networks.

    The layers at these paths get random parameters and statistics instead of their own, so that every channel
    has an effect on the output. So do variables that are all zeros or only shapes.
    """
    rng = np.random.default_rng(0)
    random = {path_parts(path) for path in layers}
    flat = traverse_util.flatten_dict(unfreeze(dict(variables)), keep_empty_nodes=True)
    values = {
        path: _variable(path, leaf, path[1:-1] in random, rng) if hasattr(leaf, "shape") else leaf
        for path, leaf in flat.items()
    }
    case = traverse_util.unflatten_dict(values)
    small_batch = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((_BATCH, *leaf.shape[1:]), leaf.dtype), call.inputs
    )
    for shapes in (small_batch, call.inputs):
        try:
            jax.eval_shape(lambda v, x: call.run(whole, v, x, call.modes[0]), case, shapes)
            break
        except Exception:  # user code that depends on the batch size may raise anything
            continue
    return case, jax.tree.map(lambda leaf: _normal(leaf, rng), shapes)


def same_numbers(
    whole: Compact, small: Compact, take: Callable[..., Any], case: Case, call: NetworkCall, step: float
) -> bool:
    """Check that a network and its smaller one return the same in all modes, up to rounding.

    It is also true if the case is inconclusive: the whole network's outputs are not finite, or change as much
    under a tiny change of the input. ``take`` makes the smaller one's variables; ``step`` is the rounding.
    """
    variables, inputs = case
    run = _compiled(whole, lambda variables: variables, case, call)
    expected = run(variables, inputs)
    try:
        actual = _compiled(small, take, case, call)(variables, inputs)
    except Exception:  # user code that depends on its number of channels may raise anything
        return False
    difference = _difference(actual, expected, step)
    if difference <= 1.0:
        return True
    nearby = jax.tree.map(lambda leaf: _nudged(leaf, step), inputs)
    return difference <= 10 * _difference(run(variables, nearby), expected, step)


def _compiled(model: Compact, take: Callable[..., Any], case: Case, call: NetworkCall) -> Callable[..., Any]:
    """Compile a network as a function of the whole one's variables; it returns the outputs of all modes."""

    def run(variables: Any, inputs: Any) -> Any:
        small = take(variables)
        with intercept_calls(without_dropout):
            return [call.run(model, small, inputs, train)[0] for train in call.modes]

    # It runs only once or twice, so compile time counts.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    with jax.default_matmul_precision("highest"):
        return jax.jit(run).lower(*case).compile(compiler_options=options)


def _difference(actual: Any, expected: Any, step: float) -> float:
    """Return the largest difference between two results, in units of the rounding error allowed."""
    actual, expected = jax.device_get((actual, expected))
    largest = 0.0
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        if one.shape != other.shape:
            return np.inf
        if not one.size or jnp.issubdtype(one.dtype, jnp.complexfloating):
            continue
        if not jnp.issubdtype(one.dtype, jnp.floating):  # such as predicted classes, where ties may break
            largest = max(largest, 100 * float(np.mean(one != other)))
            continue
        here, there = one.astype(np.float64), other.astype(np.float64)
        if not np.isfinite(there).all():
            continue
        allowed = 3 * np.sqrt(step) * np.abs(there).max() + 1e-6
        largest = max(largest, float(np.nan_to_num(np.abs(here - there).max() / allowed, nan=np.inf)))
    return largest


def _nudged(leaf: Any, step: float) -> Any:
    """Perturb an input by a few rounding steps."""
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
    if path[-1] in ("scale", "var"):
        values = rng.uniform(0.5, 1.5, size=leaf.shape)
    elif path[-1] == "kernel":
        values = rng.normal(size=leaf.shape) * np.sqrt(2 / max(np.prod(leaf.shape[:-1]), 1))
    else:
        values = rng.normal(size=leaf.shape) * 0.5
    return values.astype(leaf.dtype)


def _normal(leaf: Any, rng: np.random.Generator) -> Any:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(0), leaf.shape)
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return rng.normal(size=leaf.shape).astype(leaf.dtype)
    return rng.integers(2, size=leaf.shape).astype(leaf.dtype)
