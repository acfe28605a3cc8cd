"""Random numbers of a round: for every layer its own, whatever the other layers are."""

import functools
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from selconv_jax.functional._allocation import LayerState


def layer_draws(states: dict[str, LayerState], key: jax.Array) -> dict[str, jax.Array]:
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
