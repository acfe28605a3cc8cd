"""Variables with a given fraction of the channels re-allocated or closed."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from numpy.typing import NDArray

from selconv_jax.functional._allocation import LayerState, fill_slots
from selconv_jax.functional._groups import group_count
from selconv_jax.transforms._layer_tree import layer_states, merge_layers

_SHIFT_RANGE = 1.5  # pixels; method, "Re-allocate"


def with_copies(variables: Mapping[str, Any], share: float, seed: int) -> Any:
    """Re-allocate a fraction of the channels of every selective layer, as rounds of re-allocation would.

    The channels are chosen at random, closed, and filled with shifted copies of random open ones (method,
    "Re-allocate", step 4: their kernel rows are 0, their batch norm is that of the source). Gate-only layers
    stay.

    ``share`` is in [0, 1] and rounded down to whole channels; at 1 each half is filled from the other. All
    channels must be open.
    """
    rng = np.random.default_rng(seed)
    states = {name: state for name, state in layer_states(variables).items() if state.source is not None}
    halves: dict[str, list[NDArray[np.bool_]]] = {}
    for name, state in states.items():
        channels = state.gate.shape[0]
        slots = rng.permutation(channels)[: _count(share, channels)]
        parts = np.array_split(slots, 2) if channels == len(slots) > 1 else [slots, slots[:0]]
        halves[name] = [np.isin(np.arange(channels), part) for part in parts]
    for half in range(2):
        drawn, shifts = {}, {}
        for name, state in states.items():
            is_slot = halves[name][half]
            channels, rank = state.shift.shape  # type: ignore[union-attr]
            # A single channel copies itself.
            sources = np.flatnonzero(~is_slot) if not is_slot.all() else np.arange(channels)
            drawn[name] = np.where(is_slot, rng.choice(sources, channels), -1).astype(np.int32)
            shifts[name] = rng.uniform(-_SHIFT_RANGE, _SHIFT_RANGE, (channels, rank)).astype(np.float32)
        states = _close_and_fill(states, drawn, shifts)
    return merge_layers(variables, states)


def with_closed(variables: Mapping[str, Any], share: float, seed: int) -> Any:
    """Close a random fraction of the channels of every selective and gate-only layer.

    ``share`` is in [0, 1] and rounded down to whole channels; an open one is left in every group of a
    convolution. All channels must be open.
    """
    rng = np.random.default_rng(seed)
    states = {}
    for name, state in layer_states(variables).items():
        channels = state.gate.shape[0]
        groups = group_count(channels, state.kernel.shape)
        order = rng.permutation(channels)
        # The last channel of each group in that order stays open.
        group_of = order // (channels // groups)
        stays = {int(np.flatnonzero(group_of == group)[-1]) for group in range(groups)}
        may_close = np.array([channel for place, channel in enumerate(order) if place not in stays], int)
        gate = np.ones(channels, bool)
        gate[may_close[: _count(share, channels)]] = False
        states[name] = dataclasses.replace(state, gate=jnp.asarray(gate))
    return merge_layers(variables, states)


def without_allocation(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Drop shifts, gates and sources: the variables of the plain network with the same parameters."""
    params = traverse_util.flatten_dict(variables["params"])
    kept = {path: leaf for path, leaf in params.items() if path[-1] != "shift"}
    return {"params": traverse_util.unflatten_dict(kept), "batch_stats": variables["batch_stats"]}


def _count(share: float, channels: int) -> int:
    # 0.3 of 10 channels is 3, despite the rounding error of 0.3 * 10.
    return math.floor(share * channels + 1e-9)


@jax.jit
def _close_and_fill(
    states: dict[str, LayerState], drawn: dict[str, jax.Array], shifts: dict[str, jax.Array]
) -> dict[str, LayerState]:
    """Close some channels of all layers and open them again as copies of the drawn ones."""
    new = {}
    for name, state in states.items():
        assert state.source is not None
        is_slot = drawn[name] >= 0
        source = jnp.where(is_slot, -1, state.source)
        closed = dataclasses.replace(state, gate=state.gate & ~is_slot, source=source)
        new[name] = fill_slots(closed, drawn[name], shifts[name])
    return new
