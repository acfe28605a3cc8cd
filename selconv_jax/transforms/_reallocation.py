"""Re-allocation of a whole model: one jitted update of its variables."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from selconv_jax._utils.modules import is_nnx_module
from selconv_jax._xla.explicit_axes import replicated, sharded_as
from selconv_jax.errors import ConfigError
from selconv_jax.functional._allocation import LayerState, deallocate, fill_slots, sources_from_uniform
from selconv_jax.functional._damage import channel_scores, expected_channel_damage, normalize_damage
from selconv_jax.functional._groups import group_count
from selconv_jax.transforms._draws import layer_draws
from selconv_jax.transforms._layer_tree import are_replicas, layer_states, merge_layers, refuse_replicas
from selconv_jax.transforms._report import LayerReport, Report
from selconv_jax.transforms._rule import AllocationRule, Rule, rules_of_layers

if TYPE_CHECKING:
    from flax import nnx

V = TypeVar("V", bound=Mapping[str, Any])


@overload
def reallocate(variables: "nnx.Module", key: jax.Array, rule: Rule = None) -> Report: ...


@overload
def reallocate(variables: V, key: jax.Array, rule: Rule = None) -> tuple[V, Report]: ...


def reallocate(variables: Any, key: jax.Array, rule: Rule = None) -> Any:
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

    The optimizer's state is not touched; `selconv_jax.reset_rewritten` resets it where the round rewrote
    parameters. After the round, `selconv_jax.with_capacity` fits the program to the new number of copies.

    Args:
        variables: The model's variables: ``params``, ``batch_stats``, ``selectivity``. Other collections
            and parameters are returned unchanged. An NNX module is updated in place, see
            `selconv_jax.nnx.reallocate`; only the report is returned.
        key: A PRNG key.
        rule: Settings of the round; None: the published ones. A function that takes the path of a layer, as
            in `Report`, returns the settings for this layer, or None to leave it as it is.

    Returns:
        The new variables, with the structure, shapes, dtypes and shardings of the old ones, and a `Report` of
        the layers that took part.

    Raises:
        ConfigError: ``variables`` is no dictionary or holds shapes, ``key`` is not a PRNG key, or ``rule`` is
            or returns no `AllocationRule`, or None for all layers.
        ValueError: There is no selective layer, an array of one is missing, the shapes of its arrays are
            inconsistent, or the variables are replicas, as from `flax.jax_utils.replicate`, each of which
            would draw for itself. (Traced replicas, whose values cannot be compared, all draw the same.)

    Example:
        >>> import jax, jax.numpy as jnp, selconv_jax
        >>> layer = selconv_jax.SelectiveConv(features=4, kernel_size=(3, 3))
        >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 8, 8, 16)), train=False)
        >>> variables, report = selconv_jax.reallocate(
        ...     variables, jax.random.key(1), selconv_jax.AllocationRule(threshold=0.1))
        >>> print(report)
        Report(deallocated=2, reallocated=2, open=16, copies=2, channels=16, layers=1)
    """
    if is_nnx_module(variables):
        from selconv_jax.nnx import _transforms  # of an outer ring, which NNX users alone load

        return _transforms.reallocate(variables, key, rule)
    _check_key(key)
    states = layer_states(variables)
    traced, static = _arguments(rules_of_layers(rule, states))
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(states)):
        raise ConfigError(
            "the variables are shapes; pass their values. For the shapes of the result use jax.eval_shape."
        )
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((states, key, traced))):
        new_states, layers = _rewrite(states, key, traced, static)
    else:
        refuse_replicas(states)
        # Put on the device by name, as users may forbid implicit transfers (`jax.transfer_guard`).
        new_states, layers = _compiled(states, static)(states, key, jax.device_put(traced))
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


class _TracedFields(NamedTuple):
    """Fields of an `AllocationRule` that are arguments of the compiled round, not constants."""

    threshold: ArrayLike
    shift_range: ArrayLike


class _LayerRule(NamedTuple):
    """What the round of a layer is compiled for; hashable."""

    name: str
    rule: AllocationRule  # without its traced fields
    number: int  # of the traced fields, which layers may share


def _arguments(rules: Mapping[str, AllocationRule]) -> tuple[list[_TracedFields], tuple[_LayerRule, ...]]:
    """Separate what a round takes as arguments from what it is compiled for."""
    distinct = list({id(rule): rule for rule in rules.values()}.values())
    numbers = {id(rule): number for number, rule in enumerate(distinct)}
    traced = [_TracedFields(rule.threshold, rule.shift_range) for rule in distinct]
    static = [
        dataclasses.replace(
            rule,
            threshold=0.0,
            shift_range=0.0,
            top_k=int(rule.top_k),
            max_copies=None if rule.max_copies is None else int(rule.max_copies),
        )
        for rule in distinct
    ]
    of_layers = ((name, numbers[id(rule)]) for name, rule in rules.items())
    return traced, tuple(_LayerRule(name, static[number], number) for name, number in of_layers)


def _compiled(states: dict[str, LayerState], rules: tuple[_LayerRule, ...]) -> Any:
    """Return the jitted round whose results have the shardings of its arguments."""
    # An array that is not committed to a device stays so, and can be combined with arrays on any mesh.
    leaves, structure = jax.tree.flatten({name: states[name] for name, *_ in rules})
    shardings = (leaf.sharding if getattr(leaf, "committed", False) else None for leaf in leaves)
    return _jitted(structure, tuple(shardings), rules)


@functools.lru_cache(maxsize=32)
def _jitted(structure: Any, shardings: tuple[Any, ...], rules: tuple[_LayerRule, ...]) -> Any:
    out_shardings = jax.tree.unflatten(structure, shardings)
    return jax.jit(functools.partial(_rewrite, rules=rules), out_shardings=(out_shardings, None))


def _rewrite(
    states: dict[str, LayerState],
    key: jax.Array,
    traced: Sequence[_TracedFields],
    rules: tuple[_LayerRule, ...],
) -> tuple[dict[str, LayerState], dict[str, LayerReport]]:
    """Run a round on every layer that has a rule: the new states, and what changed, by path."""
    # On a mesh of explicit axes the round runs on replicated arrays.
    before, states = states, jax.tree.map(replicated, states)
    new_states, reports = {}, {}
    draws = layer_draws(states, key)
    is_replica = are_replicas(states)  # replicas of one model all take the numbers of the first
    for name, rule, number in rules:
        drawn = draws[name]
        if is_replica is not None:
            drawn = jnp.where(is_replica, drawn[:1], drawn)
        state, reports[name] = _stack_round(states[name], drawn, traced[number], rule)
        new_states[name] = jax.tree.map(sharded_as, state, before[name])
    return new_states, reports


def _stack_round(
    state: LayerState, uniform: jax.Array, traced: _TracedFields, rule: AllocationRule
) -> tuple[LayerState, LayerReport]:
    """Run `_layer_round` for each layer of a stack."""
    if state.gate.ndim == 1:
        return _layer_round(state, uniform, traced, rule)
    return jax.vmap(functools.partial(_stack_round, traced=traced, rule=rule))(state, uniform)


def _layer_round(
    state: LayerState, uniform: jax.Array, traced: _TracedFields, rule: AllocationRule
) -> tuple[LayerState, LayerReport]:
    """De-allocate and re-allocate one layer, with its numbers from `layer_draws`."""
    groups = group_count(state.gate.shape[0], state.kernel.shape)
    gate, source = deallocate(_normalized(state), state.gate, state.source, traced.threshold, groups)
    deallocated = state.gate & ~gate
    state = dataclasses.replace(state, gate=gate, source=source)
    filled = jnp.zeros_like(gate)
    copies = jnp.zeros((), jnp.int32)
    if source is not None and state.shift is not None and rule.top_k > 0:
        drawn = _drawn_sources(state, uniform[:, 0], rule)
        reach = jnp.asarray(traced.shift_range, uniform.dtype)
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


def _drawn_sources(state: LayerState, uniform: jax.Array, rule: AllocationRule) -> jax.Array:
    """Draw the source of every closed slot: ``[C]`` int32, -1 for none."""
    if not rule.random_sources:
        scores = channel_scores(_normalized(state), state.source, rule.max_copies)
        return sources_from_uniform(uniform, scores, state.gate, rule.top_k)
    # The ablation is the same draw with equal scores.
    alike = jnp.ones((1, state.gate.shape[0]), uniform.dtype)
    scores = channel_scores(alike, state.source, rule.max_copies)
    return sources_from_uniform(uniform, scores, state.gate, state.gate.shape[0])


def _normalized(state: LayerState) -> jax.Array:
    """Compute the normalized damage of a layer, ``[O, C]``."""
    return normalize_damage(expected_channel_damage(state.kernel, state.scale, state.bias, state.gate))
