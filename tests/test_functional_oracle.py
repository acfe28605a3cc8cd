"""The array functions against the oracle, on thousands of random layers.

Every function starts from the same float32 numbers as the oracle, so that only its own rounding is
between them. Decisions (which channels close, which are candidates) are compared wherever float
arithmetic can be held to one; ``oracle.closing_counts`` says where it cannot.
"""

import jax
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import oracle
import strategies
from array_functions import (
    assert_same_state,
    both_precisions,
    channel_scores,
    close_and_score,
    damage_of,
    deallocate,
    draw_often,
    expected_channel_damage,
    fill_slots,
    keys,
    layer_of,
    many,
    normalize_damage,
    normalized_of,
    precision,
    rounded,
    shift_and_select,
    slack_of,
    state_of,
)
from selconv_jax import functional
from strategies import SHAPES, Recipe


@pytest.mark.usefixtures("device_count")
@both_precisions
@many(max_examples=40)
@given(recipe=strategies.recipes())
@example(recipe=Recipe("2-D", 0, whole=True, far=2.0))
@example(recipe=Recipe("3-D", 0, whole=True, far=1e10))
@example(recipe=Recipe("1-D", 0, copies=1.0, closed=0.0))
def test_shift_and_select(dtype, recipe):
    x, shift, source = recipe.image(), recipe.shifts(), recipe.layer().source
    with precision(dtype):
        shifted, selected = shift_and_select(x.astype(dtype), shift.astype(dtype), source)
    expected, expected_selected = oracle.shift(x, shift), oracle.select(x, source, shift)
    assert shifted.dtype == selected.dtype == dtype
    if recipe.whole:  # one pixel with weight 1
        np.testing.assert_array_equal(shifted, expected)
        np.testing.assert_array_equal(selected, expected_selected)
    # A coordinate of at most 16 pixels is off by a few roundings, x by 5 of its deviations.
    limit = 200 * np.finfo(dtype).eps
    np.testing.assert_allclose(shifted, expected, rtol=0, atol=limit)
    np.testing.assert_allclose(selected, expected_selected, rtol=0, atol=limit)


@pytest.mark.usefixtures("device_count")
def test_select_does_not_depend_on_spare_slots():
    recipe = Recipe("1-D", 0)
    x, source, shift = recipe.image(), recipe.layer().source, recipe.shifts()
    copies, channels = int(np.sum(source != -1)), recipe.sizes.channels
    assert 0 < copies < channels - 1
    expected = oracle.select(x, source, shift)
    for capacity in (copies, copies + 1):
        with precision(np.float64):
            selected = jax.jit(functional.select, static_argnums=3)(x, source, shift, capacity)
        np.testing.assert_allclose(selected, expected, rtol=0, atol=1e-13)


@both_precisions
@many(max_examples=120)
@given(recipe=strategies.recipes())
@example(recipe=Recipe("2-D", 0, silent=1.0))
@example(recipe=Recipe("2-D", 0, empty=1.0))
def test_damage(dtype, recipe):
    layer = recipe.layer()
    expected = damage_of(layer)
    eps = np.finfo(dtype).eps
    with precision(dtype):
        state = state_of(layer, dtype)
        damage = expected_channel_damage(state.kernel, state.scale, state.bias, state.gate)
        normalized = normalize_damage(rounded(expected, dtype).astype(dtype))
    assert damage.dtype == normalized.dtype == dtype
    # Both factors are sums that may cancel: the bound is on the sizes of their terms.
    taps = np.abs(layer.kernel).sum(tuple(range(layer.kernel.ndim - 2)), keepdims=True)
    terms = oracle.damage(taps, np.zeros_like(layer.scale), np.ones_like(layer.bias), layer.gate | True)
    limit = 8 * eps * terms * (np.abs(layer.scale) + np.abs(layer.bias))
    assert np.all(np.abs(np.asarray(damage) - expected) <= limit)
    assert not np.any(np.asarray(damage)[:, ~layer.gate])
    np.testing.assert_allclose(
        normalized,
        oracle.normalize(rounded(expected, dtype)),
        rtol=(4 + recipe.sizes.channels) * eps,
        atol=np.finfo(dtype).tiny,
    )


@both_precisions
@many(max_examples=120)
@given(recipe=strategies.recipes(["2-D 1x1", "one channel"]), max_copies=st.sampled_from((None, 0, 1)))
@example(recipe=Recipe("2-D 1x1", 0, copies=1.0, closed=0.0), max_copies=0)
def test_scores(dtype, recipe, max_copies):
    layer = recipe.layer()
    normalized = normalized_of(layer, dtype)
    expected = oracle.scores(normalized, layer.source, max_copies)
    with precision(dtype):
        scores = channel_scores(normalized.astype(dtype), layer.source, max_copies)
    assert scores.dtype == dtype
    assert not np.any(np.asarray(scores)[expected == 0])
    floats = np.finfo(dtype)  # squares below the smallest of them vanish
    np.testing.assert_allclose(
        scores,
        expected,
        rtol=(4 + recipe.sizes.outputs) * floats.eps,
        atol=4 * np.sqrt(floats.tiny),
    )


@both_precisions
@many(max_examples=200)
@given(recipe=strategies.recipes(), threshold=strategies.thresholds())
@example(recipe=Recipe("2-D", 0, exact=True, closed=0.0, empty=0.0), threshold=0.0)
@example(recipe=Recipe("2-D", 0, empty=1.0, copies=1.0), threshold=0.5)
@example(recipe=Recipe("2-D", 0, copies=1.0, closed=0.3), threshold=0.999)
@example(recipe=Recipe("one channel", 0), threshold=0.999)
@example(recipe=Recipe("groups", 0, closed=0.0, empty=0.8), threshold=0.5)
@example(recipe=Recipe("depthwise", 0, closed=0.0, empty=0.8), threshold=0.999)
def test_deallocate(dtype, recipe, threshold):
    layer = recipe.layer()
    normalized = normalized_of(layer, dtype)
    threshold = float(dtype(threshold))
    with precision(dtype):
        new_gate, new_source = deallocate(
            normalized.astype(dtype), layer.gate, layer.source, threshold, groups=recipe.sizes.groups
        )
    # The order rests on comparisons alone, which are exact; only sums can be rounded.
    slack = slack_of(recipe.sizes.channels, threshold, dtype)
    allowed = [
        oracle.close(normalized, layer.gate, layer.source, count, recipe.sizes.groups)
        for count in oracle.closing_counts(normalized, threshold, slack)
    ]
    assert any(
        np.array_equal(new_gate, gate) and np.array_equal(new_source, source) for gate, source in allowed
    )
    assert new_gate.dtype == bool
    assert new_source.dtype == np.int32
    assert not np.any(np.asarray(new_gate) & ~layer.gate)
    # A layer keeps an open channel, and so does each group that had one.
    kept = np.asarray(new_gate).reshape(recipe.sizes.groups, -1).any(1)
    np.testing.assert_array_equal(kept, layer.gate.reshape(recipe.sizes.groups, -1).any(1))


@both_precisions
@many(max_examples=100)
@given(
    recipe=strategies.recipes(["1-D"]),
    max_copies=st.sampled_from((None, 0, 1)),
    top_k=st.sampled_from((1, 3)),
)
@example(recipe=Recipe("1-D", 0, closed=1.0), max_copies=None, top_k=3)
@example(recipe=Recipe("1-D", 0, exact=True, empty=0.0), max_copies=None, top_k=1)
@example(recipe=Recipe("1-D", 0, empty=1.0), max_copies=None, top_k=3)
def test_draw_sources(dtype, recipe, max_copies, top_k):
    layer = recipe.layer()
    scores = oracle.scores(normalized_of(layer, dtype), layer.source, max_copies).astype(dtype)
    with precision(dtype):
        drawn = draw_often(keys(32), scores, layer.gate, top_k)
    candidates = oracle.candidates(scores, layer.gate, top_k)
    slots = ~layer.gate & bool(candidates)
    drawn = np.asarray(drawn)
    assert drawn.dtype == np.int32
    assert np.all(drawn[:, ~slots] == -1)
    assert set(drawn[:, slots].ravel()) <= set(candidates)


@both_precisions
@many(max_examples=100)
@given(recipe=strategies.recipes(), fill=st.sampled_from((0.0, 0.5, 1.0)))
@example(recipe=Recipe("2-D", 0, copies=1.0), fill=1.0)
@example(recipe=Recipe("groups", 0, copies=0.3), fill=1.0)
def test_reallocate(dtype, recipe, fill):
    layer = recipe.layer()
    generator = np.random.default_rng(recipe.seed)
    channels = recipe.sizes.channels
    drawn = generator.choice(np.flatnonzero(layer.gate), channels)
    drawn[layer.gate | (generator.random(channels) >= fill)] = -1
    drawn = drawn.astype(np.int32)
    drawn_shift = recipe.shifts(salt=1)
    with precision(dtype):
        state = state_of(layer, dtype)
        new = fill_slots(state, drawn, drawn_shift.astype(dtype))
    assert_same_state(new, oracle.reallocate(layer, drawn, drawn_shift), dtype)
    assert new.kernel.size == layer.kernel.size
    # The new kernel rows are zero: the layer's function does not change, to the last bit.
    x = recipe.image()
    before, *_ = oracle.forward(x, layer)
    after, *_ = oracle.forward(x, layer_of(new))
    np.testing.assert_array_equal(after, before)


@both_precisions
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "depthwise"])
def test_decisions_of_stacks_of_layers(dtype, shape):
    """From kernels to candidates, where roundings add up; few decisions may be in doubt.

    In depthwise layers all channels with damage score alike: nothing but doubt.
    """
    count, top_k = 200, 3
    threshold = float(dtype(0.03))
    # What all roundings up to a decision may add up to where sums of kernels cancel.
    limit = 1e-4 if dtype == np.float32 else 1e-12
    layers = [Recipe(shape, seed).layer() for seed in range(count)]
    with precision(dtype):
        stack = state_of(jax.tree.map(lambda *arrays: np.stack(arrays), *layers), dtype)
        step = jax.jit(jax.vmap(close_and_score, (0, None)))
        gates, sources, scores = map(np.asarray, step(stack, threshold))
    assert np.all(gates.any(1))
    doubtful = 0
    for layer, our_gate, our_source, our_score in zip(layers, gates, sources, scores, strict=True):
        normalized = oracle.normalize(damage_of(layer))
        groups = oracle.groups_of(len(layer.gate), layer.kernel)
        gate, source = oracle.deallocate(normalized, layer.gate, layer.source, threshold, groups)
        if oracle.margin(normalized, threshold) <= limit:
            doubtful += 1
            assert np.sum(gate != our_gate) <= 1
            continue
        np.testing.assert_array_equal(our_gate, gate)
        np.testing.assert_array_equal(our_source, source)
        normalized = oracle.normalize(damage_of(layer._replace(gate=gate)))
        score = oracle.scores(normalized, source, max_copies=1)
        np.testing.assert_allclose(our_score, score, rtol=0, atol=limit)
        ranked = [*np.sort(score[gate])[::-1], *[0.0] * top_k]
        tie = 0 < ranked[top_k - 1] - ranked[top_k] <= limit
        if tie or any(0 < value <= limit for value in ranked[:top_k]):
            doubtful += 1
            continue
        assert set(oracle.candidates(our_score, our_gate, top_k)) == set(
            oracle.candidates(score, gate, top_k)
        )
    assert doubtful <= 0.02 * count
