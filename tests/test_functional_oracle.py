"""The array functions against the oracle: thousands of random layers, and the method's edge cases.

Every function starts from the same float32 numbers as the oracle, so that only its own rounding is
between them. Decisions (which channels close, which are candidates) are compared wherever float
arithmetic can be held to one; ``oracle.closing_counts`` says where it cannot.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import strategies
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import SHAPES, Recipe

from selconv_jax import functional
from selconv_jax.functional import LayerState

FLOATS = ("kernel", "scale", "bias", "mean", "var", "shift")
both_precisions = pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["f32", "f64"])
# Derandomized: the same layers everywhere, so that a failure can be repeated.
many = functools.partial(settings, deadline=None, derandomize=True, database=None)

expected_channel_damage = jax.jit(functional.expected_channel_damage)
normalize_damage = jax.jit(functional.normalize_damage)
channel_scores = jax.jit(functional.channel_scores, static_argnums=2)
deallocate = jax.jit(functional.deallocate)
reallocate = jax.jit(functional.reallocate)
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


# Random layers


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


def test_select_does_not_depend_on_spare_slots():
    recipe = Recipe("1-D", 0)
    x, source, shift = recipe.image(), recipe.layer().source, recipe.shifts()
    copies, channels = int(np.sum(source != -1)), recipe.sizes.channels
    assert 0 < copies < channels - 1
    expected = oracle.select(x, source, shift)
    for slots in (copies, copies + 1):
        with precision(np.float64):
            selected = jax.jit(functional.select, static_argnums=3)(x, source, shift, slots)
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
    terms = np.abs(layer.kernel).sum(tuple(range(layer.kernel.ndim - 2))).T
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
def test_deallocate(dtype, recipe, threshold):
    layer = recipe.layer()
    normalized = normalized_of(layer, dtype)
    threshold = float(dtype(threshold))
    with precision(dtype):
        new_gate, new_source = deallocate(normalized.astype(dtype), layer.gate, layer.source, threshold)
    # The order rests on comparisons alone, which are exact; only sums can be rounded.
    slack = slack_of(recipe.sizes.channels, threshold, dtype)
    allowed = [
        oracle.close(normalized, layer.gate, layer.source, count)
        for count in oracle.closing_counts(normalized, threshold, slack)
    ]
    assert any(
        np.array_equal(new_gate, gate) and np.array_equal(new_source, source) for gate, source in allowed
    )
    assert new_gate.dtype == bool
    assert new_source.dtype == np.int32
    assert np.any(new_gate)
    assert not np.any(np.asarray(new_gate) & ~layer.gate)


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
        new = reallocate(state, drawn, drawn_shift.astype(dtype))
    assert_same_state(new, oracle.reallocate(layer, drawn, drawn_shift), dtype)
    assert new.kernel.size == layer.kernel.size
    # The new kernel rows are zero: the layer's function does not change, to the last bit.
    x = recipe.image()
    before, *_ = oracle.forward(x, layer)
    after, *_ = oracle.forward(x, layer_of(new))
    np.testing.assert_array_equal(after, before)


def close_and_score(state, threshold):
    """De-allocation and the scores after it, by our functions."""
    arguments = state.kernel, state.scale, state.bias
    damage = functional.expected_channel_damage(*arguments, state.gate)
    normalized = functional.normalize_damage(damage)
    gate, source = functional.deallocate(normalized, state.gate, state.source, threshold)
    normalized = functional.normalize_damage(functional.expected_channel_damage(*arguments, gate))
    return gate, source, functional.channel_scores(normalized, source, max_copies=1)


@both_precisions
@pytest.mark.parametrize("shape", SHAPES)
def test_decisions_of_stacks_of_layers(dtype, shape):
    """From kernels to candidates, where roundings add up; few decisions may be in doubt."""
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
        gate, source = oracle.deallocate(normalized, layer.gate, layer.source, threshold)
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


# Edge cases worked by hand


@both_precisions
@pytest.mark.parametrize(
    ("damage", "threshold", "closed"),
    [
        pytest.param([[1, 1, 1, 1]], 0.1, [], id="nothing to close"),
        pytest.param([[1e-12, 1e-12, 1e-12, 0]], 1e-3, [], id="everything below the threshold"),
        pytest.param([[0, 0, 0, 0]], 0.0, [], id="no damage, threshold 0"),
        pytest.param([[0, 0, 0, 0]], 0.5, [], id="no damage"),
        pytest.param([[0, 3, 0, 1]], 0.0, [0, 2], id="threshold 0 closes what does no damage"),
        pytest.param([[0, 0, 5, 0]], 0.999, [0, 1, 3], id="one channel does all damage"),
        pytest.param([[5, 1, 2, 4]], 1.0, [], id="threshold 1"),
        pytest.param([[5, 1, 2, 4]], 2.0, [], id="threshold above 1"),
        pytest.param([[5]], 0.999, [], id="one channel"),
        pytest.param([[0]], 0.0, [], id="one channel, no damage"),
        # Equal damage: the lowest index is closed first.
        pytest.param([[64, 64, 64, 64]], 0.6, [0, 1], id="tie"),
        pytest.param([[64, 32, 64, 32]], 0.4, [1, 3], id="tie out of order"),
        # Each output has its own sum: 0.2 + 0.1 in the first, 0.1 + 0.2 in the second.
        pytest.param([[2, 1, 7, 0], [1, 2, 7, 0]], 0.31, [0, 1, 3], id="sums per output"),
        # The order is by the worst output, not by the mean of them.
        pytest.param([[3, 2, 1, 4], [0, 2, 0, 8]], 0.35, [1, 2], id="worst output"),
        pytest.param([[-3, 1, -16, 0]], 0.06, [1, 3], id="negative damage"),
    ],
)
def test_closed_channels(dtype, damage, threshold, closed):
    channels = len(damage[0])
    damage = np.broadcast_to(damage, (2, channels)).astype(dtype)
    with precision(dtype):
        gate, source = deallocate(
            normalize_damage(damage), np.ones(channels, bool), np.zeros(channels, np.int32), threshold
        )
    assert np.flatnonzero(~np.asarray(gate)).tolist() == closed
    assert np.flatnonzero(np.asarray(source) == -1).tolist() == closed


@both_precisions
def test_gate_only_layer_with_damage_equal_to_the_threshold(dtype):
    with precision(dtype):
        gate, source = deallocate(np.full((2, 4), 0.25, dtype), np.ones(4, bool), None, 0.5)
    assert gate.tolist() == [False, False, True, True]
    assert source is None


@both_precisions
def test_threshold_one_closes_nothing_whatever_the_rounding(dtype):
    # In float32 the 1e-8 of the normalization vanishes and rows may sum to more than 1.
    damage = np.random.default_rng(0).uniform(size=(500, 4, 33)).astype(dtype)

    @jax.jit
    @jax.vmap
    def normalize_and_deallocate(damage):
        normalized = functional.normalize_damage(damage)
        return normalized, functional.deallocate(normalized, jnp.ones(33, bool), None, 1.0)[0]

    with precision(dtype):
        normalized, gates = normalize_and_deallocate(damage)
    assert np.all(gates)
    assert dtype == np.float64 or np.max(np.cumsum(normalized, -1)) > 1


@both_precisions
def test_activation_without_deviation(dtype):
    scale = np.repeat([0.0, -0.0, 1e-30, -1e-30], 3)
    bias = np.tile([-1.0, 0.0, 1.0], 4)
    with precision(dtype):
        damage = expected_channel_damage(
            np.ones((1, 12, 1), dtype), scale.astype(dtype), bias.astype(dtype), np.ones(12, bool)
        )
    np.testing.assert_allclose(damage[0], np.maximum(bias, 0), rtol=0, atol=1e-29)


@both_precisions
def test_activation_does_not_depend_on_the_sign_of_the_scale(dtype):
    scale, bias = np.array([2.0, -2.0, 1.0, -1.0]), np.array([0.0, 0.0, -1.0, -1.0])
    with precision(dtype):
        damage = expected_channel_damage(
            np.ones((1, 1, 4, 1), dtype), scale.astype(dtype), bias.astype(dtype), np.ones(4, bool)
        )
    # 2 / sqrt(2 pi), and phi(1) - Phi(-1)
    expected = [0.7978845608028654, 0.7978845608028654, 0.0833154705876862, 0.0833154705876862]
    np.testing.assert_allclose(damage[0], expected, rtol=10 * np.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("scores", "closed", "top_k", "candidates"),
    [
        pytest.param([3, 0, 2, 1, 1, 1, 1, 1], [1], 3, {0, 2, 3}, id="best of the open"),
        # Equal scores: the lowest index is the better candidate.
        pytest.param([1, 1, 0, 1, 1, 1, 1, 1], [2], 3, {0, 1, 3}, id="tie"),
        pytest.param([1, 2, 0, 1, 2, 0, 1, 1], [2], 3, {0, 1, 4}, id="tie for the last place"),
        pytest.param([1, 2, 1, 1, 0, 2, 2, 2], [4], 1, {1}, id="tie for the only place"),
        pytest.param([1, 2, 0, 0, 0, 0, 0, 0], range(2, 8), 3, {0, 1}, id="fewer open than top_k"),
        pytest.param([1, 2, 0, 1, 1, 0, 0, 0], [2], 9, {0, 1, 3, 4}, id="fewer channels than top_k"),
        pytest.param([0, 2, 0, 0, 1, 0, 0, 0], [3], 3, {1, 4}, id="only positive scores"),
        pytest.param([0, 0, 0, 0, 0, 0, 0, 0], [2, 4], 3, set(), id="no candidate"),
        pytest.param([1, 2, 3, 4, 5, 6, 7, 8], [], 3, set(), id="no slot"),
        pytest.param([1, 9, 2, 1, 1, 1, 1, 1], [1], 1, {2}, id="a closed channel is never drawn"),
        pytest.param([4], [], 1, set(), id="one channel"),
    ],
)
def test_drawn_channels(scores, closed, top_k, candidates):
    gate = np.ones(len(scores), bool)
    gate[list(closed)] = False
    drawn = draw_often(keys(32), np.asarray(scores, np.float32), gate, top_k)
    drawn = np.asarray(drawn)
    assert np.all(drawn[:, gate] == -1)
    assert set(drawn[:, ~gate].ravel()) == (candidates or {-1} if closed else set())


def test_every_candidate_is_drawn_alike_and_slots_independently():
    scores = np.array([0.5, 0.0, 0.9, 0.1, 0.0, 0.5, 0.0, 0.2], np.float32)
    gate = np.array([True, False, True, True, False, True, False, True])
    drawn = np.concatenate([draw_often(batch, scores, gate, 3) for batch in keys(9600).reshape(300, 32)])
    draws = len(drawn)
    slots, candidates = [1, 4, 6], [0, 2, 5]
    for slot in slots:
        counts = [np.sum(drawn[:, slot] == candidate) for candidate in candidates]
        assert sum(counts) == draws
        # Chi-square with 2 degrees of freedom: above 18.4 once in 10,000 keys.
        assert sum((n - draws / 3) ** 2 / (draws / 3) for n in counts) < 18.4
    for first, second in ((1, 4), (1, 6), (4, 6)):
        counts = [
            np.sum((drawn[:, first] == one) & (drawn[:, second] == other))
            for one in candidates
            for other in candidates
        ]
        # 8 degrees of freedom: above 31.8 once in 10,000 keys.
        assert sum((n - draws / 9) ** 2 / (draws / 9) for n in counts) < 31.8


def test_limit_of_copies():
    normalized = np.full((2, 4), 0.25, np.float32)
    source = np.array([-1, 0, 0, 3], np.int32)  # 0 is read twice, 3 by itself
    for max_copies, expected in ((0, [0, 0, 0, 0]), (1, [0, 0, 0, 1]), (2, [1, 1, 1, 1])):
        scores = np.asarray(channel_scores(normalized, source, max_copies))
        np.testing.assert_array_equal(scores > 0, np.array(expected, bool))


@pytest.mark.parametrize(
    ("source", "drawn", "expected"),
    [
        pytest.param([-1, -1, -1], [-1, 0, 0], [-1, 0, 0], id="originals"),
        # Channel 0 is a copy of the closed channel 1: slot 1 becomes a shifted copy of itself.
        pytest.param([1, -1, -1], [-1, 0, -1], [1, 1, -1], id="copy of this very slot"),
        pytest.param([2, -1, 0], [-1, 0, -1], [2, 2, 0], id="copy of a copy"),
        pytest.param([0, -1, -1], [-1, 0, -1], [0, 0, -1], id="copy of a self-copy"),
        pytest.param([-1, -1, -1], [-1, -1, -1], [-1, -1, -1], id="nothing drawn"),
    ],
)
def test_sources_after_reallocation(source, drawn, expected):
    filled = np.array(drawn) != -1
    ones = np.ones(3, np.float32)
    state = LayerState(
        kernel=np.ones((1, 3, 2), np.float32),
        scale=np.array([1, 2, 3], np.float32),
        bias=ones,
        mean=ones,
        var=ones,
        gate=~filled,
        source=np.array(source, np.int32),
        shift=np.zeros((3, 1), np.float32),
    )
    new = reallocate(state, np.array(drawn, np.int32), np.full((3, 1), 1.5, np.float32))
    assert new.source.tolist() == expected
    assert new.gate.all()
    assert new.scale.tolist() == [i + 1.0 if origin == -1 else origin + 1.0 for i, origin in enumerate(drawn)]
    np.testing.assert_array_equal(new.shift[:, 0], np.where(filled, 1.5, 0.0))
    np.testing.assert_array_equal(new.kernel[0].any(-1), ~filled)


def test_a_copy_that_is_closed_again_reads_its_source_no_more():
    normalized = np.array([[0.5, 0.0, 0.5, 0.0], [0.75, 0.0, 0.25, 0.0]], np.float32)
    copies = np.array([-1, 0, 0, 0], np.int32)
    gate, source = deallocate(normalized, np.ones(4, bool), copies, 1e-3)
    assert (gate.tolist(), source.tolist()) == ([True, False, True, False], [-1, -1, 0, -1])
    assert channel_scores(normalized, copies, 1)[0] == 0
    assert channel_scores(normalized, np.asarray(source), 1)[0] > 0


# Transformations


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
    new = functional.reallocate(state, drawn, shift)
    assert_same_state(reallocate(state, drawn, shift), new, np.float32)


def whole_round(state, key):
    """De-allocation and re-allocation of one layer."""
    gate, source, scores = close_and_score(state, 0.2)
    drawn = functional.draw_sources(key, scores, gate, 2)
    closed = dataclasses.replace(state, gate=gate, source=source)
    return drawn, functional.reallocate(closed, drawn, state.shift + 1)


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


# Gradients


def gradients(x, shift, cotangent):
    return jax.vjp(functional.channel_shift, x, shift)[1](cotangent)


jitted_gradients = jax.jit(gradients)


@many(max_examples=25)
@given(shape=st.sampled_from(sorted(SHAPES)), seed=st.integers(0, 2**32 - 1))
def test_gradients_of_shift_are_central_differences(shape, seed):
    sizes = SHAPES[shape]
    generator = np.random.default_rng(seed)
    x = Recipe(shape, seed).image()
    offset = (sizes.channels, len(sizes.image))
    # Kinks are at whole pixels.
    shift = generator.integers(-5, 5, offset) + generator.uniform(0.1, 0.9, offset)
    cotangent = generator.normal(size=x.shape)
    direction = generator.normal(size=x.shape)
    with precision(np.float64):
        grad_x, grad_shift = map(np.asarray, jitted_gradients(x, shift, cotangent))
    assert grad_x.dtype == grad_shift.dtype == np.float64
    # Linear in x.
    np.testing.assert_allclose(
        np.sum(grad_x * direction), np.sum(oracle.shift(direction, shift) * cotangent), atol=1e-11
    )
    step = 1e-5
    for axis in range(len(sizes.image)):
        moved = np.zeros(offset)
        moved[:, axis] = step
        difference = oracle.shift(x, shift + moved) - oracle.shift(x, shift - moved)
        expected = (difference * cotangent).sum(tuple(range(x.ndim - 1))) / (2 * step)
        np.testing.assert_allclose(grad_shift[:, axis], expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("amount", [4.0, 4.5, 1e6, -4.0, -4.5, -1e6])
def test_gradient_at_and_beyond_the_clamp_is_zero(amount):
    x = np.random.default_rng(0).normal(size=(2, 5, 3))
    shift = np.full((3, 1), amount)
    with precision(np.float64):
        grad_x, grad_shift = map(np.asarray, jitted_gradients(x, shift, np.ones_like(x)))
    assert not grad_shift.any()
    border = 4 if amount > 0 else 0
    assert np.all(grad_x[:, border] == 5)  # every pixel reads the border
    assert np.all(np.delete(grad_x, border, axis=1) == 0)


@pytest.mark.parametrize(
    ("amount", "expected"),
    [
        # Rows 0 ... 4 hold 0, 1, 10, 100, 1000. Coordinates 1, 2, 3 lie inside; 0 and 4 are at the
        # clamp. At a whole pixel the gradient is the difference to the next one.
        (0.0, 9 + 90 + 900),
        (1.0, 9 + 90 + 900),
        (-1.0, 9 + 90 + 900),
        (2.0, 90 + 900),
        (-3.0, 9),
        (0.5, 1 + 9 + 90 + 900),
        (-0.5, 1 + 9 + 90 + 900),
        (3.5, 900),
    ],
)
def test_gradient_of_whole_and_clamped_pixels(amount, expected):
    x = np.array([0.0, 1.0, 10.0, 100.0, 1000.0]).reshape(1, 5, 1)
    with precision(np.float64):
        _, grad_shift = jitted_gradients(x, np.array([[amount]]), np.ones_like(x))
    assert grad_shift.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_select(shape):
    recipe = Recipe(shape, 0, copies=0.6, closed=0.2)
    x, shift, source = recipe.image(), recipe.shifts(), recipe.layer().source
    cotangent, direction = np.random.default_rng(0).normal(size=(2, *x.shape))
    unread = np.where(source[:, None] == -1, np.nan, shift)  # shifts without effect

    @jax.jit
    def gradients(x, shift):
        return jax.vjp(lambda *inputs: functional.select(inputs[0], source, inputs[1]), x, shift)[1](
            cotangent
        )

    with precision(np.float64):
        grad_x, grad_shift = map(np.asarray, gradients(x, unread))
    np.testing.assert_allclose(
        np.sum(grad_x * direction),
        np.sum(oracle.select(direction, source, shift) * cotangent),
        atol=1e-11,
    )
    np.testing.assert_array_equal(grad_shift[source == -1], 0.0)
    step = 1e-6
    for axis in range(shift.shape[1]):
        moved = np.zeros_like(shift)
        moved[:, axis] = step
        difference = oracle.select(x, source, shift + moved) - oracle.select(x, source, shift - moved)
        expected = (difference * cotangent).sum(tuple(range(x.ndim - 1))) / (2 * step)
        np.testing.assert_allclose(grad_shift[:, axis], expected, rtol=0, atol=1e-7)
