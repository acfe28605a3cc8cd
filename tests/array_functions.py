"""The array functions as their tests call them: compiled once, and the oracle's layers as their states."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import settings

import oracle
from selconv_jax import functional
from selconv_jax.functional import LayerState

FLOATS = ("kernel", "scale", "bias", "mean", "var", "shift")
both_precisions = pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["f32", "f64"])
# Derandomized: the same layers everywhere, so that a failure can be repeated.
many = functools.partial(settings, deadline=None, derandomize=True, database=None)

expected_channel_damage = jax.jit(functional.expected_channel_damage)
normalize_damage = jax.jit(functional.normalize_damage)
channel_scores = jax.jit(functional.channel_scores, static_argnums=2)
deallocate = jax.jit(functional.deallocate, static_argnames="groups")
fill_slots = jax.jit(functional.fill_slots)
# As many answers as keys. It compiles slowly: nearly all tests use 32 keys and 8 channels.
draw_often = jax.jit(jax.vmap(functional.draw_sources, (0, None, None, None)), static_argnums=3)


@jax.jit
def shift_and_select(x, shift, source):
    return functional.channel_shift(x, shift), functional.select(x, source, shift)


def precision(dtype):
    return jax.enable_x64(dtype == np.float64)


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def state_of(layer, dtype):
    """The oracle's layer, or a stack of them, as the package's state."""
    return LayerState(
        **{
            name: array.astype(dtype if name in FLOATS else array.dtype)
            for name, array in layer._asdict().items()
        }
    )


def layer_of(state):
    """The package's state as the oracle's layer."""
    return oracle.Layer(
        **{
            name: np.asarray(getattr(state, name), np.float64 if name in FLOATS else None)
            for name in oracle.Layer._fields
        }
    )


def assert_same_state(actual, expected, dtype):
    for name in oracle.Layer._fields:
        array = getattr(actual, name)
        assert array.dtype == (dtype if name in FLOATS else getattr(expected, name).dtype), name
        np.testing.assert_array_equal(array, getattr(expected, name), name)


def damage_of(layer):
    return oracle.damage(layer.kernel, layer.scale, layer.bias, layer.gate)


def rounded(array, dtype):
    """Numbers of ``dtype``, stored as float64; subnormal ones are 0, as compiled code takes them."""
    normal = np.abs(array) >= np.finfo(dtype).tiny
    return np.where(normal, array, 0.0).astype(dtype).astype(np.float64)


def normalized_of(layer, dtype):
    return rounded(oracle.normalize(damage_of(layer)), dtype)


def slack_of(channels, threshold, dtype):
    """What sums of ``channels`` numbers close to the threshold may be off by."""
    return 2 * channels * np.finfo(dtype).eps * threshold


def close_and_score(state, threshold):
    """De-allocation and the scores after it, by our functions."""
    arguments = state.kernel, state.scale, state.bias
    damage = functional.expected_channel_damage(*arguments, state.gate)
    normalized = functional.normalize_damage(damage)
    groups = oracle.groups_of(state.gate.shape[0], state.kernel)
    gate, source = functional.deallocate(normalized, state.gate, state.source, threshold, groups)
    normalized = functional.normalize_damage(functional.expected_channel_damage(*arguments, gate))
    return gate, source, functional.channel_scores(normalized, source, max_copies=1)
