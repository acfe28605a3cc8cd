"""Re-allocation of a whole model: one jitted rewrite of its variables."""

import dataclasses
import functools
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from flax.core import FrozenDict, freeze, unfreeze

from selconv_jax.allocation import LayerState, deallocate, sources_from_uniform
from selconv_jax.allocation import reallocate as fill_slots
from selconv_jax.damage import channel_scores, expected_channel_damage, normalize_damage
from selconv_jax.errors import ConfigError

__all__ = ["Allocation", "LayerReport", "Report", "layer_states", "reallocate", "required_slots"]

Path = tuple[str, ...]
Variables = Mapping[str, Any]

# Where a layer of path p keeps each field: variables[collection][p][field].
_COLLECTION = {
    "kernel": "params",
    "scale": "params",
    "bias": "params",
    "shift": "params",
    "mean": "batch_stats",
    "var": "batch_stats",
    "gate": "selectivity",
    "source": "selectivity",
}
_OPTIONAL = ("source", "shift")


@dataclasses.dataclass(frozen=True)
class Allocation:
    """How a round of de-allocation and re-allocation decides (method, "De-allocation" and after).

    Attributes:
        threshold: Share of the damage that may be lost by closing channels, in [0, 1].
        top_k: Number of channels that compete for the free slots; 0 only closes.
        max_copies: No further copies of a channel that more than this many read; None: no limit.
        shift_range: New copies start at shifts drawn from ``[-shift_range, shift_range]`` pixels.

    Raises:
        ConfigError: A value is out of bounds.

    Example:
        >>> Allocation(threshold=2.0)
        Traceback (most recent call last):
        ...
        selconv_jax.errors.ConfigError: threshold is 2.0; it must be in [0, 1].
    """

    threshold: float = 1e-3
    top_k: int = 3
    max_copies: int | None = None
    shift_range: float = 1.5

    def __post_init__(self) -> None:
        if not 0.0 <= self.threshold <= 1.0:
            raise ConfigError(f"threshold is {self.threshold}; it must be in [0, 1].")
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}; it must be at least 0 (0: only close channels).")
        if self.max_copies is not None and self.max_copies < 0:
            raise ConfigError(f"max_copies is {self.max_copies}; it must be at least 0, or None.")
        if not 0.0 <= self.shift_range < float("inf"):
            raise ConfigError(f"shift_range is {self.shift_range}; it must be finite and at least 0.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What one round did to one layer with ``C`` input channels.

    Attributes:
        deallocated: ``[C]`` bool, channels that were open and that the round closed.
        reallocated: ``[C]`` bool, closed channels that the round filled: their kernel, batch norm and
            shift are rewritten. A channel can be both.
        open: ``[]`` int32, open channels after the round.
        copies: ``[]`` int32, channels that read another one (or themselves, shifted) after the round.
    """

    deallocated: jax.Array
    reallocated: jax.Array
    open: jax.Array
    copies: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Report:
    """What one round did to a model: `LayerReport` by the path of the layer, ``"block1/conv"`` style.

    Example:
        >>> import jax, jax.numpy as jnp, selconv_jax
        >>> layer = selconv_jax.SelectiveConv(features=2, kernel_size=(1, 1))
        >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 4, 4, 8)), train=False)
        >>> variables, report = selconv_jax.reallocate(variables, jax.random.key(1))
        >>> report.closed, report.reallocated, report.channels
        (0, 0, 8)
    """

    layers: dict[str, LayerReport]

    @property
    def closed(self) -> int:
        """Channels that the round closed, in all layers."""
        return sum(int(layer.deallocated.sum()) for layer in self._host().values())

    @property
    def reallocated(self) -> int:
        """Closed channels that the round filled, in all layers."""
        return sum(int(layer.reallocated.sum()) for layer in self._host().values())

    @property
    def channels(self) -> int:
        """Input channels of all layers."""
        return sum(layer.deallocated.size for layer in self.layers.values())

    @property
    def open(self) -> int:
        """Open channels after the round, in all layers."""
        return sum(int(layer.open.sum()) for layer in self._host().values())

    @property
    def copies(self) -> int:
        """Channels that read through a source after the round, in all layers."""
        return sum(int(layer.copies.sum()) for layer in self._host().values())

    def _host(self) -> dict[str, LayerReport]:
        return jax.device_get(self.layers)


def reallocate(
    variables: Variables, key: jax.Array, allocation: Allocation | None = None
) -> tuple[Any, Report]:
    """Closes useless channels in every selective layer and gives their weights to the best ones.

    One round of the method's "De-allocation" and "Re-allocation" for all layers of any Flax model; the
    layers are found by the ``selectivity`` collection. Gate-only layers are only de-allocated.
    Every layer draws from ``key`` folded with its path, so that the draws of a layer do not depend on
    which others there are, and every process of a cluster draws alike. Fold a step or epoch into
    ``key`` yourself, or each round draws the same.

    Compiled once for a model and an allocation. May be called inside of another ``jit``.

    Args:
        variables: The model's variables: ``params``, ``batch_stats``, ``selectivity``; other collections
            and other parameters pass through untouched.
        key: A PRNG key.
        allocation: Threshold and limits; None: the published ones.

    Returns:
        The new variables, with the structure, shapes, dtypes and shardings of the old; and a `Report`.

    Raises:
        ValueError: There is no selective layer, a part of one is missing, or its shapes are not those of one
            layer without groups.

    Example:
        >>> import jax, jax.numpy as jnp, selconv_jax
        >>> layer = selconv_jax.SelectiveConv(features=4, kernel_size=(3, 3))
        >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 8, 8, 16)), train=False)
        >>> variables, report = selconv_jax.reallocate(
        ...     variables, jax.random.key(1), selconv_jax.Allocation(threshold=0.1))
        >>> report.closed == report.reallocated > 0
        True
    """
    allocation = allocation or Allocation()
    states = layer_states(variables)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((states, key))):
        new_states, layers = _rewrite(states, key, allocation)
    else:
        new_states, layers = _compiled(states, allocation)(states, key)
    return _merge(variables, new_states), Report(layers)


def required_slots(variables: Variables) -> float:
    """The largest share of copies among the channels of any selective layer, see `SelectiveConv.slots`.

    Args:
        variables: The model's variables, holding concrete arrays.

    Returns:
        A share in [0, 1].

    Example:
        >>> import jax, jax.numpy as jnp, selconv_jax
        >>> layer = selconv_jax.SelectiveConv(features=2, kernel_size=(1, 1))
        >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 4, 4, 8)), train=False)
        >>> selconv_jax.required_slots(variables)
        0.0
    """
    sources = [state.source for state in layer_states(variables).values() if state.source is not None]
    shares = [(source >= 0).mean() for source in jax.device_get(sources)]
    return max(map(float, shares), default=0.0)


def layer_states(variables: Variables) -> dict[str, LayerState]:
    """The selective and gate-only layers of a model, by path.

    Args:
        variables: The model's variables: ``params``, ``batch_stats``, ``selectivity``.

    Returns:
        `LayerState` by the path of the layer, parts joined by ``/`` (``""`` for a model that is one layer).

    Raises:
        ValueError: There is no selective layer, or a part of one is missing.
    """
    flat = {
        collection: traverse_util.flatten_dict(unfreeze(variables.get(collection, {})))
        for collection in ("params", "batch_stats", "selectivity")
    }
    paths = [path[:-1] for path in flat["selectivity"] if path[-1] == "gate"]
    if not paths:
        raise ValueError(
            "no selective layer found: looked for 'gate' in variables['selectivity'], among the "
            f"collections {sorted(variables)}. Use selconv_jax.SelectiveConv and pass all its variables."
        )
    for path in paths:
        if any("/" in part for part in path):
            raise ValueError(f"selective layer {path}: rename the module, its name must not contain '/'.")
    return {"/".join(path): _layer_state(path, flat) for path in paths}


def _layer_state(path: Path, flat: dict[str, dict[Path, Any]]) -> LayerState:
    fields: dict[str, Any] = {}
    for field, collection in _COLLECTION.items():
        value = flat[collection].get((*path, field))
        if value is None and field not in _OPTIONAL:
            raise ValueError(
                f"selective layer {'/'.join(path)!r}: variables[{collection!r}] has no {field!r} for it. "
                "Pass params, batch_stats and selectivity of the same model."
            )
        fields[field] = value
    if (fields["source"] is None) != (fields["shift"] is None):
        raise ValueError(
            f"selective layer {'/'.join(path)!r}: it must have both 'source' (selectivity) and 'shift' "
            "(params), or, if it is gate-only, neither."
        )
    state = LayerState(**fields)
    _check_shapes("/".join(path), state)
    return state


def _check_shapes(name: str, state: LayerState) -> None:
    """Refuses what is not one plain layer: stacked, boxed or grouped ones."""
    channels = jnp.shape(state.gate)
    kernel: tuple[int, ...] = getattr(state.kernel, "shape", ())
    expected = dict.fromkeys(("scale", "bias", "mean", "var", "gate", "source"), channels)
    expected["shift"] = (*channels, len(kernel) - 2)
    wrong = [
        f"{field} has shape {getattr(value, 'shape', type(value).__name__)}, expected {shape}"
        for field, shape in expected.items()
        if (value := getattr(state, field)) is not None and getattr(value, "shape", None) != shape
    ]
    if len(channels) != 1 or len(kernel) < 2:
        wrong.append(f"gate has shape {channels} and kernel {kernel}, expected [C] and [*K, C, O]")
    elif kernel[-2] != channels[0]:
        wrong.append(f"kernel has shape {kernel} for {channels[0]} channels")
    if wrong:
        raise ValueError(
            f"selective layer {name!r}: {wrong[0]}. Layers with groups cannot be re-allocated; unbox "
            "partitioned parameters with flax.linen.meta.unbox; map stacked layers by jax.vmap."
        )


def _merge(variables: Variables, states: dict[str, LayerState]) -> Any:
    """The variables with the fields of ``states`` put in their places."""
    merged = unfreeze(dict(variables))
    flat = {name: traverse_util.flatten_dict(merged[name]) for name in set(_COLLECTION.values())}
    for name, state in states.items():
        path = tuple(name.split("/")) if name else ()
        for field, collection in _COLLECTION.items():
            value = getattr(state, field)
            if value is not None:
                flat[collection][(*path, field)] = value
    merged = {**merged, **{name: traverse_util.unflatten_dict(leaves) for name, leaves in flat.items()}}
    return freeze(merged) if isinstance(variables, FrozenDict) else merged


def _compiled(states: dict[str, LayerState], allocation: Allocation) -> Any:
    """The jitted round whose results lie where its arguments lie."""
    # An array that was not committed to a device stays so: it may join others on any mesh.
    shardings = tuple(
        leaf.sharding if getattr(leaf, "committed", False) else None for leaf in jax.tree.leaves(states)
    )
    return _jitted(jax.tree.structure(states), shardings, allocation)


@functools.lru_cache(maxsize=32)
def _jitted(structure: Any, shardings: tuple[Any, ...], allocation: Allocation) -> Any:
    out_shardings = jax.tree.unflatten(structure, shardings)
    return jax.jit(functools.partial(_rewrite, allocation=allocation), out_shardings=(out_shardings, None))


def _rewrite(
    states: dict[str, LayerState], key: jax.Array, allocation: Allocation
) -> tuple[dict[str, LayerState], dict[str, LayerReport]]:
    new_states, reports = {}, {}
    for (name, state), uniform in zip(states.items(), _draws(states, key), strict=True):
        new_states[name], reports[name] = _round(state, uniform, allocation)
    return new_states, reports


def _draws(states: dict[str, LayerState], key: jax.Array) -> list[jax.Array]:
    """Uniform numbers in [0, 1) for every layer: ``[C, 1 + dimensions]``, for source and shift.

    They are drawn for all layers at once, as wide as the widest: random numbers are what a compiler takes
    longest over. What a layer draws depends on the key, its path and the channel alone.
    """
    layer_keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(
        key, jnp.array([zlib.crc32(name.encode()) for name in states], jnp.uint32)
    )
    channels = max(state.gate.shape[0] for state in states.values())
    dimensions = max(state.kernel.ndim - 2 for state in states.values())
    uniform = jax.vmap(lambda layer_key: jax.random.uniform(layer_key, (channels, 1 + dimensions)))(
        layer_keys
    )
    return [
        uniform[index, : state.gate.shape[0], : state.kernel.ndim - 1]
        for index, state in enumerate(states.values())
    ]


def _round(state: LayerState, uniform: jax.Array, allocation: Allocation) -> tuple[LayerState, LayerReport]:
    """De-allocates and re-allocates one layer with its numbers of `_draws`."""
    gate, source = deallocate(_normalized(state), state.gate, state.source, allocation.threshold)
    deallocated = state.gate & ~gate
    state = dataclasses.replace(state, gate=gate, source=source)
    filled = jnp.zeros_like(gate)
    copies = jnp.zeros((), jnp.int32)
    if source is not None and state.shift is not None and allocation.top_k > 0:
        scores = channel_scores(_normalized(state), source, allocation.max_copies)
        drawn = sources_from_uniform(uniform[:, 0], scores, gate, allocation.top_k)
        state = fill_slots(state, drawn, allocation.shift_range * (2 * uniform[:, 1:] - 1))
        filled = drawn >= 0
    if state.source is not None:
        copies = jnp.sum(state.source >= 0, dtype=jnp.int32)
    return state, LayerReport(
        deallocated=deallocated,
        reallocated=filled,
        open=jnp.sum(state.gate, dtype=jnp.int32),
        copies=copies,
    )


def _normalized(state: LayerState) -> jax.Array:
    return normalize_damage(expected_channel_damage(state.kernel, state.scale, state.bias, state.gate))
