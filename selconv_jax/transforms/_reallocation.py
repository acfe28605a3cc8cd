"""Re-allocation of a whole model: one jitted update of its variables."""

import dataclasses
import functools
import math
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from selconv_jax._utils.arguments import check_number, check_whole
from selconv_jax._utils.modules import is_nnx_module
from selconv_jax.errors import ConfigError
from selconv_jax.functional._allocation import LayerState, deallocate, fill_slots, sources_from_uniform
from selconv_jax.functional._damage import channel_scores, expected_channel_damage, normalize_damage
from selconv_jax.functional._groups import group_count
from selconv_jax.transforms._layer_tree import are_replicas, layer_states, merge_layers, refuse_replicas
from selconv_jax.transforms._report import LayerReport, Report

if TYPE_CHECKING:
    from flax import nnx

Variables = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class AllocationRule:
    """Rule by which a round closes and refills channels (method, "De-allocate" and "Re-allocate").

    Attributes:
        threshold: Fraction of the damage that may be lost by closing channels, in [0, 1]. Like
            ``shift_range``, it may be an array ``[]``, traced or not; a new value does not recompile.
        top_k: Number of channels that compete for the closed slots; 0: channels are closed, none refilled.
        max_copies: Sources that more than this many channels read are not copied again, nor are their
            copies; None: no limit.
        shift_range: Shifts of new copies are drawn from ``[-shift_range, shift_range]`` pixels.
        random_sources: Ablation: instead of the top K, all open channels that ``max_copies`` does not
            exclude are equally likely sources, whatever their scores (``top_k=0`` still only closes).

    Raises:
        ConfigError: A value is out of bounds.

    Example:
        >>> from selconv_jax import AllocationRule
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


@overload
def reallocate(
    variables: "nnx.Module", key: jax.Array, allocation: AllocationRule | None = None
) -> Report: ...


@overload
def reallocate(
    variables: Variables, key: jax.Array, allocation: AllocationRule | None = None
) -> tuple[Any, Report]: ...


def reallocate(variables: Any, key: jax.Array, allocation: AllocationRule | None = None) -> Any:
    """Close the least important channels of every selective layer and refill them with copies of the best.

    One round of the method's "De-allocate" and "Re-allocate" for all layers of any Flax model; the layers
    are found by the ``selectivity`` collection. Gate-only layers are only de-allocated.
    Every layer draws from ``key`` folded with its path. With JAX's default generator, its draws therefore
    do not depend on the other layers, and all processes of a cluster draw the same. Fold a step or epoch
    into ``key`` yourself, or each round draws the same.

    Layers stacked on axis 0 by ``nn.scan`` or ``nn.vmap`` are re-allocated separately, each with a key that
    is also folded with its index.

    Compiled once per model and rule, for all thresholds. It may be called under another ``jit``, and under
    ``pmap`` and ``vmap`` over replicas of the variables.

    Args:
        variables: The model's variables: ``params``, ``batch_stats``, ``selectivity``. Other collections
            and parameters are returned unchanged. An NNX module is updated in place, see
            `selconv_jax.nnx.reallocate`; only the report is returned.
        key: A PRNG key.
        allocation: Settings of the round; None: the published ones.

    Returns:
        The new variables, with the structure, shapes, dtypes and shardings of the old ones, and a `Report`.

    Raises:
        ConfigError: An argument is of another type.
        ValueError: There is no selective layer, an array of one is missing, the shapes of its arrays are
            inconsistent, or the variables are replicas, as from `flax.jax_utils.replicate`, each of which
            would draw for itself. (Traced replicas, whose values cannot be compared, all draw the same.)

    Example:
        >>> import jax, jax.numpy as jnp, selconv_jax
        >>> layer = selconv_jax.SelectiveConv(features=4, kernel_size=(3, 3))
        >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 8, 8, 16)), train=False)
        >>> variables, report = selconv_jax.reallocate(
        ...     variables, jax.random.key(1), selconv_jax.AllocationRule(threshold=0.1))
        >>> report.deallocated == report.reallocated > 0
        True
    """
    if is_nnx_module(variables):
        from selconv_jax.nnx import _transforms  # of an outer ring, which NNX users alone load

        return _transforms.reallocate(variables, key, allocation)
    allocation = AllocationRule() if allocation is None else allocation
    if not isinstance(allocation, AllocationRule):
        raise ConfigError(
            f"allocation is a {type(allocation).__name__}; it must be an AllocationRule, such as "
            "selconv_jax.AllocationRule(threshold=1e-3)."
        )
    _check_key(key)
    states = layer_states(variables)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(states)):
        raise ConfigError(
            "the variables are shapes; pass their values. For the shapes of the result use jax.eval_shape."
        )
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


def _check_key(key: Any) -> None:
    """Raise a `ConfigError` unless a value is one PRNG key."""
    found = f"a {type(key).__name__}"
    if isinstance(key, jax.Array | np.ndarray):
        is_typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        if key.ndim == (0 if is_typed else 1) and (is_typed or key.dtype == np.uint32):
            return
        found = f"an array of shape {key.shape} and dtype {key.dtype}"
    raise ConfigError(f"key is {found}; it must be a PRNG key, such as jax.random.key(0).")


class _Numbers(NamedTuple):
    """Fields of an `AllocationRule` that are arguments of the compiled round, not constants."""

    threshold: float | jax.Array
    shift_range: float | jax.Array


def _compiled(states: dict[str, LayerState], allocation: AllocationRule) -> Any:
    """Return the jitted round whose results have the shardings of its arguments."""
    # An array that is not committed to a device stays so, and can be combined with arrays on any mesh.
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
    # On a mesh of explicit axes every operation would have to name the sharding of its result, so the
    # round runs on replicated arrays.
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
    """Return the sharding of an array on a mesh of explicit axes; None: the compiler decides it."""
    sharding = jax.typeof(x).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def _draws(states: dict[str, LayerState], key: jax.Array) -> dict[str, jax.Array]:
    """Draw uniform numbers in [0, 1) for every layer: ``[*L, C, 1 + dimensions]``, for source and shift.

    All layers are drawn in one call, padded to the widest, because random number generation dominates
    compile time. A layer's numbers depend only on the key, its path and its index in a stack. Layers of
    different dimensions are drawn separately, as the numbers also depend on the size of the last axis.
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
    """Return the number of spatial dimensions of a layer."""
    return state.kernel.ndim - state.gate.ndim - 1


def _layer_keys(stacks: dict[str, tuple[int, ...]], key: jax.Array) -> jax.Array:
    """Derive one key per layer: ``key`` folded with the path and, in a stack, with the layer's index.

    Paths are hashed with CRC-32: Python's own hash of a string differs between processes.
    """
    fold_in = jax.vmap(jax.random.fold_in)
    paths = np.array([zlib.crc32(name.encode()) for name in stacks], np.uint32)
    counts = np.array([math.prod(stack) for stack in stacks.values()])
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, paths)
    if not any(stacks.values()):
        return keys
    # Rows from here on are layers: a stack of n layers takes n rows, a single layer (of stack ()) one.
    keys = keys[np.repeat(np.arange(len(counts)), counts)]
    index = np.concatenate([np.arange(count, dtype=np.uint32) for count in counts])
    is_stacked = np.repeat([bool(stack) for stack in stacks.values()], counts)
    # A single layer keeps its unfolded key, so both kinds are computed and each row picks its own.
    chosen = np.arange(len(index)) + np.where(is_stacked, len(index), 0)
    return jnp.concatenate([keys, fold_in(keys, index)])[chosen]


def _rounds(
    state: LayerState, uniform: jax.Array, numbers: _Numbers, allocation: AllocationRule
) -> tuple[LayerState, LayerReport]:
    """Run `_round` for each layer of a stack."""
    if state.gate.ndim == 1:
        return _round(state, uniform, numbers, allocation)
    return jax.vmap(functools.partial(_rounds, numbers=numbers, allocation=allocation))(state, uniform)


def _round(
    state: LayerState, uniform: jax.Array, numbers: _Numbers, allocation: AllocationRule
) -> tuple[LayerState, LayerReport]:
    """De-allocate and re-allocate one layer, with its numbers from `_draws`."""
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
    """Draw the source of every closed slot: ``[C]`` int32, -1 for none."""
    if not allocation.random_sources:
        scores = channel_scores(_normalized(state), state.source, allocation.max_copies)
        return sources_from_uniform(uniform, scores, state.gate, allocation.top_k)
    # The ablation is the same draw with equal scores.
    alike = jnp.ones((1, state.gate.shape[0]), uniform.dtype)
    scores = channel_scores(alike, state.source, allocation.max_copies)
    return sources_from_uniform(uniform, scores, state.gate, state.gate.shape[0])


def _normalized(state: LayerState) -> jax.Array:
    return normalize_damage(expected_channel_damage(state.kernel, state.scale, state.bias, state.gate))
