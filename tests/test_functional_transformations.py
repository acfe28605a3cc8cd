"""The array functions under jit and vmap."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracle
from array_functions import (
    assert_same_state,
    channel_scores,
    close_and_score,
    deallocate,
    draw_often,
    expected_channel_damage,
    fill_slots,
    keys,
    normalize_damage,
    normalized_of,
    shift_and_select,
    slack_of,
    state_of,
)
from selconv_jax import functional
from strategies import Recipe


@pytest.mark.usefixtures("device_count")
def test_jit_and_eager_agree():
    recipe = Recipe("1-D", 3, copies=0.6, closed=0.5)
    state = jax.tree.map(jnp.asarray, state_of(recipe.layer(), np.float32))
    x, shift = jnp.asarray(recipe.image(), jnp.float32), state.shift
    near = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    shifted, selected = shift_and_select(x, shift, state.source)
    near(functional.channel_shift(x, shift), shifted)
    near(functional.select(x, state.source, shift), selected)
    arguments = state.kernel, state.scale, state.bias, state.gate
    damage = functional.expected_channel_damage(*arguments)
    near(damage, expected_channel_damage(*arguments))
    normalized = functional.normalize_damage(damage)
    near(normalized, normalize_damage(damage))
    near(
        functional.channel_scores(normalized, state.source, 1),
        channel_scores(normalized, state.source, 1),
    )
    for threshold in (0.0, 0.03, 0.999):
        slack = slack_of(recipe.sizes.channels, threshold, np.float32)
        assert len(oracle.closing_counts(np.asarray(normalized, np.float64), threshold, slack)) == 1
        jax.tree.map(
            np.testing.assert_array_equal,
            functional.deallocate(normalized, state.gate, state.source, threshold),
            deallocate(normalized, state.gate, state.source, threshold),
        )
    scores = channel_scores(normalized, state.source, None)
    drawn = functional.draw_sources(keys(32)[0], scores, state.gate, 3)
    np.testing.assert_array_equal(drawn, draw_often(keys(32), scores, state.gate, 3)[0])
    new = functional.fill_slots(state, drawn, shift)
    assert_same_state(fill_slots(state, drawn, shift), new, np.float32)


def whole_round(state, key):
    """De-allocation and re-allocation of one layer."""
    gate, source, scores = close_and_score(state, 0.2)
    drawn = functional.draw_sources(key, scores, gate, 2)
    closed = dataclasses.replace(state, gate=gate, source=source)
    return drawn, functional.fill_slots(closed, drawn, state.shift + 1)


@pytest.mark.usefixtures("device_count")
def test_vmap_over_layers_is_a_loop_over_layers():
    layers = [Recipe("1-D", seed).layer() for seed in range(6)]
    assert min(oracle.margin(normalized_of(layer, np.float32), 0.2) for layer in layers) > 1e-4
    stack = state_of(jax.tree.map(lambda *arrays: np.stack(arrays), *layers), np.float32)
    drawn, filled = jax.jit(jax.vmap(whole_round))(stack, keys(6))
    assert np.any(drawn >= 0)
    one_layer = jax.jit(whole_round)
    for index, layer in enumerate(layers):
        expected_drawn, expected = one_layer(state_of(layer, np.float32), keys(6)[index])
        np.testing.assert_array_equal(drawn[index], expected_drawn)
        assert_same_state(jax.tree.map(lambda array, i=index: array[i], filled), expected, np.float32)
