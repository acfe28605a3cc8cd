"""Edge cases of damage, de-allocation and re-allocation, worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from array_functions import (
    both_precisions,
    channel_scores,
    deallocate,
    draw_often,
    expected_channel_damage,
    fill_slots,
    keys,
    normalize_damage,
    precision,
)
from selconv_jax import functional
from selconv_jax.errors import ConfigError
from selconv_jax.functional import LayerState


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
    new = fill_slots(state, np.array(drawn, np.int32), np.full((3, 1), 1.5, np.float32))
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


def test_what_is_not_a_number_stays_so():
    kernel, ones, is_open = np.ones((1, 3, 2), np.float32), np.ones(3, np.float32), np.ones(3, bool)
    for value in (np.nan, np.inf):
        scale = np.array([1, value, 1], np.float32)
        damage = expected_channel_damage(kernel, scale, ones, is_open)
        np.testing.assert_array_equal(np.isfinite(damage).all(axis=0), [True, False, True])
        assert not np.isfinite(normalize_damage(damage)[:, 1]).any()
    closed = np.array([True, False, True])
    hidden = kernel.copy()
    hidden[:, 1] = np.nan
    np.testing.assert_array_equal(expected_channel_damage(hidden, ones, ones, closed)[:, 1], 0)


def test_arguments_that_do_not_fit():
    x, source, shift = jnp.ones((1, 3, 3, 4)), jnp.full(4, -1), jnp.zeros((4, 2))
    with pytest.raises(ValueError, match=r"source has shape \(1,\), but the input has 4 channels"):
        functional.select(x, source[:1], shift)
    with pytest.raises(ValueError, match=r"shift has shape \(1, 2\)"):
        functional.select(x, source, shift[:1])
    with pytest.raises(ValueError, match="source has dtype float32; it must be integer"):
        functional.select(x, source.astype(jnp.float32), shift)
    with pytest.raises(ValueError, match="x has dtype int32; it must be floating"):
        functional.channel_shift(x.astype(jnp.int32), shift)
    with pytest.raises(ValueError, match="groups is 3, which does not divide 4 channels"):
        functional.deallocate(jnp.ones((3, 4)), jnp.ones(4, bool), None, 0.1, groups=3)


def _layer(**changes):
    ones = jnp.ones(3)
    fields = {"kernel": jnp.ones((1, 1, 3, 2)), "scale": ones, "bias": ones, "mean": ones, "var": ones}
    fields |= {"gate": GATE, "source": SOURCE, "shift": jnp.zeros((3, 2))}
    return LayerState(**fields | changes)


NORMALIZED, GATE, SOURCE = jnp.full((2, 3), 0.25), jnp.array([True, False, True]), jnp.full(3, -1)
DRAWN, SHIFT = jnp.array([-1, 0, -1]), jnp.full((3, 2), 0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        # Each of them would else be broadcast, or lose the indices that are out of range, in silence.
        (
            lambda: functional.deallocate(jnp.ones((2, 4)), GATE, SOURCE, 0.1),
            r"normalized has shape \(2, 4\)",
        ),
        (
            lambda: functional.deallocate(jnp.ones((2, 2)), GATE, SOURCE, 0.1),
            r"normalized has shape \(2, 2\)",
        ),
        (lambda: functional.deallocate(jnp.ones(3), GATE, SOURCE, 0.1), r"must be \(3, 3\): \[O, C\]"),
        (lambda: functional.deallocate(NORMALIZED, GATE, SOURCE[:1], 0.1), r"source has shape \(1,\)"),
        (lambda: functional.deallocate(NORMALIZED, GATE, GATE, 0.1), "source has dtype bool"),
        (lambda: functional.deallocate(NORMALIZED, GATE.astype(int), SOURCE, 0.1), r"bool; .* \(gate != 0\)"),
        (lambda: functional.deallocate(NORMALIZED, jnp.ones((3, 3), bool), SOURCE, 0.1), r"must be \[C\]"),
        (lambda: functional.draw_sources(keys(32)[0], jnp.ones(1), GATE, 1), r"scores has shape \(1,\)"),
        (
            lambda: functional.draw_sources(keys(32)[0], jnp.ones(3), GATE.astype(int), 1),
            "gate has dtype",
        ),
        (lambda: functional.channel_scores(NORMALIZED[:, :1], SOURCE, 1), r"source has shape \(3,\)"),
        (lambda: functional.fill_slots(_layer(), DRAWN[:1], SHIFT), r"drawn has shape \(1,\)"),
        (lambda: functional.fill_slots(_layer(), GATE, SHIFT), "drawn has dtype bool"),
        (lambda: functional.fill_slots(_layer(), DRAWN, SHIFT[:, :1]), r"shift has shape \(3, 1\)"),
        (lambda: functional.fill_slots(_layer(gate=GATE.astype(int)), DRAWN, SHIFT), "gate has dtype int32"),
        (lambda: functional.fill_slots(_layer(source=None), DRAWN, SHIFT), "gate-only"),
        (
            lambda: functional.expected_channel_damage(jnp.ones((3, 2)), jnp.ones(1), jnp.ones(3), GATE),
            r"scale has shape \(1,\)",
        ),
    ],
)
def test_arrays_of_another_layer_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_arrays_of_the_layer_give_the_values_worked_by_hand():
    normalized = jnp.array([[0.7, 0.0, 0.3], [0.05, 0.0, 0.95]])
    number = jnp.array([1, 0, 1])
    gate, source = functional.deallocate(normalized, number != 0, SOURCE, 0.1)
    assert (gate.tolist(), source.tolist()) == ([True, False, True], [-1, -1, -1])
    gate, _ = functional.deallocate(normalized, number != 0, SOURCE, 0.8)
    assert gate.tolist() == [False, False, True]
    new = functional.fill_slots(_layer(), DRAWN, SHIFT)
    assert (new.gate.tolist(), new.source.tolist()) == ([True] * 3, [-1, 0, -1])
    assert new.shift.tolist() == [[0.0, 0.0], [0.5, 0.5], [0.0, 0.0]]


def test_documented_errors_are_those_raised():
    for call in (
        lambda: functional.draw_sources(keys(32)[0], jnp.ones(3), GATE, 0),
        lambda: functional.draw_sources(keys(32)[0], jnp.ones(3), GATE, 1.5),
        lambda: functional.channel_scores(NORMALIZED, SOURCE, -1),
    ):
        with pytest.raises(ConfigError, match="whole number"):
            call()


def test_a_score_that_is_not_a_number_is_no_candidate():
    gate = np.array([True, True, True, False])
    scores = np.array([np.nan, 0.5, 0.3, 0.0], np.float32)
    drawn = draw_often(keys(32), scores, gate, 3)
    assert set(np.asarray(drawn[:, 3]).tolist()) == {1, 2}
