"""Re-allocation of a whole model: one jitted rewrite of its variables."""

import dataclasses
import functools
import math
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from selconv_jax._utils.arguments import check_number, check_whole
from selconv_jax.functional._allocation import LayerState, deallocate, fill_slots, sources_from_uniform
from selconv_jax.functional._damage import channel_scores, expected_channel_damage, normalize_damage
from selconv_jax.functional._groups import group_count
from selconv_jax.transforms._layer_tree import are_replicas, layer_states, merge_layers, refuse_replicas
from selconv_jax.transforms._report import LayerReport, Report

__all__ = ["AllocationRule", "reallocate", "required_capacity"]

Variables = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class AllocationRule:
    """How a round of de-allocation and re-allocation decides (method, "De-allocation" and after).

    Attributes:
        threshold: Share of the damage that may be lost by closing channels, in [0, 1]. This number and
            ``shift_range`` may be arrays ``[]``, traced or not; another value does not compile anew.
        top_k: Number of channels that compete for the free slots; 0 only closes.
        max_copies: No further copies of a channel that more than this many read; None: no limit.
        shift_range: New copies start at shifts drawn from ``[-shift_range, shift_range]`` pixels.
        random_sources: Ablation, random sources instead of the top K: every open channel that
            ``max_copies`` does not exclude is a candidate with equal chance, whatever its score and
            ``top_k`` (which at 0 still only closes).

    Raises:
        ConfigError: A value is out of bounds.

    Example:
        >>> AllocationRule(threshold=2.0)
        Traceback (most recent call last):
        ...
        selconv_jax.errors.ConfigError: threshold is 2.0; it must be in [0, 1].
    """

    threshold: float | jax.Array = 1e-3
    top_k: int = 3
    max_copies: int | None = None
    shift_range: float | jax.Array = 1.5
    random_sources: bool = False

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold, lambda share: 0.0 <= share <= 1.0, "in [0, 1]")
        check_whole("top_k", self.top_k, 0, "a whole number, at least 0 (0: only close channels)")
        if self.max_copies is not None:
            check_whole("max_copies", self.max_copies, 0, "a whole number, at least 0, or None")
        check_number(
            "shift_range", self.shift_range, lambda value: 0.0 <= value < math.inf, "finite and at least 0"
        )


def reallocate(
    variables: Variables, key: jax.Array, allocation: AllocationRule | None = None
) -> tuple[Any, Report]:
    """Close useless channels in every selective layer and give their weights to the best ones.

    One round of the method's "De-allocation" and "Re-allocation" for all layers of any Flax model; the
    layers are found by the ``selectivity`` collection. Gate-only layers are only de-allocated.
    Every layer draws from ``key`` folded with its path, so that the draws of a layer do not depend on
    which others there are (keys of JAX's default generator), and every process of a cluster draws alike.
    Fold a step or epoch into ``key`` yourself, or each round draws the same.

    Layers that ``nn.scan`` or ``nn.vmap`` stacked on axis 0 are re-allocated one by one, each with a key
    folded with its index too.

    Compiled once for a model and an allocation, whatever its threshold. May be called inside of another
    ``jit``, and of ``pmap`` and ``vmap`` over whole copies of the variables.

    Args:
        variables: The model's variables: ``params``, ``batch_stats``, ``selectivity``; other collections
            and other parameters pass through untouched.
        key: A PRNG key.
        allocation: Threshold and limits; None: the published ones.

    Returns:
        The new variables, with the structure, shapes, dtypes and shardings of the old; and a `Report`.

    Raises:
        ValueError: There is no selective layer, a part of one is missing, the shapes of its parts
            contradict each other, or the variables are replicas, as of `flax.jax_utils.replicate`: each
            would draw for itself. (Traced ones, whose values cannot be looked at, all draw alike.)

    Example:
        >>> import jax, jax.numpy as jnp, selconv_jax
        >>> layer = selconv_jax.SelectiveConv(features=4, kernel_size=(3, 3))
        >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 8, 8, 16)), train=False)
        >>> variables, report = selconv_jax.reallocate(
        ...     variables, jax.random.key(1), selconv_jax.AllocationRule(threshold=0.1))
        >>> report.deallocated == report.reallocated > 0
        True
    """
    allocation = allocation or AllocationRule()
    states = layer_states(variables)
    numbers = _Numbers(allocation.threshold, allocation.shift_range)
    limit = allocation.max_copies
    allocation = dataclasses.replace(  # what is compiled for; hashable
        allocation,
        threshold=0.0,
        shift_range=0.0,
        top_k=int(allocation.top_k),
        max_copies=None if limit is None else int(limit),
    )
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((states, key, numbers))):
        new_states, layers = _rewrite(states, key, numbers, allocation)
    else:
        refuse_replicas(states)
        new_states, layers = _compiled(states, allocation)(states, key, numbers)
    return merge_layers(variables, new_states), Report(layers)


def required_capacity(variables: Variables) -> float:
    """The largest share of copies among the channels of any selective layer, see `SelectiveConv.capacity`.

    Args:
        variables: The model's variables, holding concrete arrays.

    Returns:
        A share in [0, 1].

    Example:
        >>> import jax, jax.numpy as jnp, selconv_jax
        >>> layer = selconv_jax.SelectiveConv(features=2, kernel_size=(1, 1))
        >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 4, 4, 8)), train=False)
        >>> selconv_jax.required_capacity(variables)
        0.0
    """
    sources = [state.source for state in layer_states(variables).values() if state.source is not None]
    shares = [(source >= 0).mean(axis=-1).max() for source in jax.device_get(sources)]
    return max(map(float, shares), default=0.0)


class _Numbers(NamedTuple):
    """What of an `AllocationRule` is an argument of the compiled round."""

    threshold: float | jax.Array
    shift_range: float | jax.Array


def _compiled(states: dict[str, LayerState], allocation: AllocationRule) -> Any:
    """The jitted round whose results lie where its arguments lie."""
    # An array that was not committed to a device stays so: it may join others on any mesh.
    shardings = tuple(
        leaf.sharding if getattr(leaf, "committed", False) else None for leaf in jax.tree.leaves(states)
    )
    return _jitted(jax.tree.structure(states), shardings, allocation)


@functools.lru_cache(maxsize=32)
def _jitted(structure: Any, shardings: tuple[Any, ...], allocation: AllocationRule) -> Any:
    out_shardings = jax.tree.unflatten(structure, shardings)
    return jax.jit(functools.partial(_rewrite, allocation=allocation), out_shardings=(out_shardings, None))


def _rewrite(
    states: dict[str, LayerState], key: jax.Array, numbers: _Numbers, allocation: AllocationRule
) -> tuple[dict[str, LayerState], dict[str, LayerReport]]:
    # On a mesh of explicit axes each operation would have to say where its result lies.
    leaves, structure = jax.tree.flatten(states)
    shardings = [_explicit_sharding(leaf) for leaf in leaves]
    whole = [sharding and NamedSharding(sharding.mesh, PartitionSpec()) for sharding in shardings]
    states = jax.tree.unflatten(structure, map(_resharded, leaves, whole))
    new_states, reports = {}, {}
    draws = _draws(states, key)
    of_first = are_replicas(states)
    for name, state in states.items():
        drawn = draws[name]
        if of_first is not None:
            drawn = jnp.where(of_first, drawn[:1], drawn)
        new_states[name], reports[name] = _rounds(state, drawn, numbers, allocation)
    new_leaves = map(_resharded, jax.tree.leaves(new_states), shardings)
    return jax.tree.unflatten(structure, new_leaves), reports


def _resharded(x: jax.Array, to: NamedSharding | None) -> jax.Array:
    return x if to is None else jax.sharding.reshard(x, to)


def _explicit_sharding(x: jax.Array) -> NamedSharding | None:
    """Where an array lies on a mesh of explicit axes; None where that is left to the compiler."""
    sharding = jax.typeof(x).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def _draws(states: dict[str, LayerState], key: jax.Array) -> dict[str, jax.Array]:
    """Uniform numbers in [0, 1) for every layer: ``[*L, C, 1 + dimensions]``, for source and shift.

    They are drawn for all layers at once, as many channels as the widest has: random numbers are what a
    compiler takes longest over. What a layer draws depends on the key, its path and its index in a stack
    alone; layers of different dimensions are drawn apart, as the numbers of a draw depend on its last axis.
    """
    draws = {}
    for dimensions in sorted({_dimensions(state) for state in states.values()}):
        gates = {name: state.gate for name, state in states.items() if _dimensions(state) == dimensions}
        layer_keys = _layer_keys({name: gate.shape[:-1] for name, gate in gates.items()}, key)
        shape = (max(gate.shape[-1] for gate in gates.values()), 1 + dimensions)
        uniform = jax.vmap(functools.partial(jax.random.uniform, shape=shape))(layer_keys)
        start = 0
        for name, gate in gates.items():
            *stack, channels = gate.shape
            count = math.prod(stack)
            drawn = uniform[start : start + count, :channels]
            draws[name] = drawn.reshape(*stack, channels, 1 + dimensions)
            start += count
    return draws


def _dimensions(state: LayerState) -> int:
    """The number of spatial dimensions of a layer."""
    return state.kernel.ndim - state.gate.ndim - 1


def _layer_keys(stacks: dict[str, tuple[int, ...]], key: jax.Array) -> jax.Array:
    """One key per layer: ``key`` folded with the path and, in a stack, with the layer's index."""
    fold_in = jax.vmap(jax.random.fold_in)
    paths = np.array([zlib.crc32(name.encode()) for name in stacks], np.uint32)
    counts = np.array([math.prod(stack) for stack in stacks.values()])
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, paths)
    if not any(stacks.values()):
        return keys
    keys = keys[np.repeat(np.arange(len(counts)), counts)]
    index = np.concatenate([np.arange(count, dtype=np.uint32) for count in counts])
    is_stacked = np.repeat([bool(stack) for stack in stacks.values()], counts)
    chosen = np.arange(len(index)) + np.where(is_stacked, len(index), 0)
    return jnp.concatenate([keys, fold_in(keys, index)])[chosen]


def _rounds(
    state: LayerState, uniform: jax.Array, numbers: _Numbers, allocation: AllocationRule
) -> tuple[LayerState, LayerReport]:
    """`_round`, for each layer of a stack."""
    if state.gate.ndim == 1:
        return _round(state, uniform, numbers, allocation)
    return jax.vmap(functools.partial(_rounds, numbers=numbers, allocation=allocation))(state, uniform)


def _round(
    state: LayerState, uniform: jax.Array, numbers: _Numbers, allocation: AllocationRule
) -> tuple[LayerState, LayerReport]:
    """De-allocates and re-allocates one layer with its numbers of `_draws`."""
    groups = group_count(state.gate.shape[0], state.kernel.shape)
    gate, source = deallocate(_normalized(state), state.gate, state.source, numbers.threshold, groups)
    deallocated = state.gate & ~gate
    state = dataclasses.replace(state, gate=gate, source=source)
    filled = jnp.zeros_like(gate)
    copies = jnp.zeros((), jnp.int32)
    if source is not None and state.shift is not None and allocation.top_k > 0:
        drawn = _drawn_sources(state, uniform[:, 0], allocation)
        reach = jnp.asarray(numbers.shift_range, uniform.dtype)
        state = fill_slots(state, drawn, reach * (2 * uniform[:, 1:] - 1))
        filled = drawn >= 0
    if state.source is not None:
        copies = jnp.sum(state.source >= 0, dtype=jnp.int32)
    return state, LayerReport(
        deallocated=deallocated,
        reallocated=filled,
        open=jnp.sum(state.gate, dtype=jnp.int32),
        copies=copies,
    )


def _drawn_sources(state: LayerState, uniform: jax.Array, allocation: AllocationRule) -> jax.Array:
    """The source of every free slot ``[C]`` int32, -1 for none."""
    if not allocation.random_sources:
        scores = channel_scores(_normalized(state), state.source, allocation.max_copies)
        return sources_from_uniform(uniform, scores, state.gate, allocation.top_k)
    # The ablation is the same draw among channels that all score alike.
    alike = jnp.ones((1, state.gate.shape[0]), uniform.dtype)
    scores = channel_scores(alike, state.source, allocation.max_copies)
    return sources_from_uniform(uniform, scores, state.gate, state.gate.shape[0])


def _normalized(state: LayerState) -> jax.Array:
    return normalize_damage(expected_channel_damage(state.kernel, state.scale, state.bias, state.gate))
