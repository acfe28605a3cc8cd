"""Layers with groups: kernel rows, damage, and a whole round, worked by hand and against the layer itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracle
import selconv_jax
from selconv_jax import AllocationRule, SelectiveConv
from selconv_jax.functional import deallocate, expected_channel_damage, normalize_damage
from selconv_jax.functional._groups import group_count, kernel_rows
from states import perturbed_variables


def test_rows_of_a_kernel():
    rows = kernel_rows(jnp.arange(6), (3, 3, 2, 6))  # three groups of two channels and two outputs
    assert rows.shape == (1, 1, 2, 6)
    np.testing.assert_array_equal(rows[0, 0], [[0, 0, 2, 2, 4, 4], [1, 1, 3, 3, 5, 5]])
    assert kernel_rows(jnp.arange(6), (3, 6, 4)).shape == (1, 6, 1)
    stacked = kernel_rows(jnp.arange(12).reshape(2, 6), (2, 3, 2, 6))
    assert stacked.shape == (2, 1, 2, 6)
    np.testing.assert_array_equal(stacked[1, 0], rows[0, 0] + 6)


@pytest.mark.parametrize(
    ("channels", "kernel"), [(5, (3, 2, 4)), (4, (3, 2, 5)), (4, (3, 8, 8)), (4, (0, 4))]
)
def test_kernels_that_belong_to_other_layers(channels, kernel):
    with pytest.raises(ValueError, match=rf"shape \({kernel[0]}, .*for {channels} input channels"):
        group_count(channels, kernel)


def test_damage_is_within_groups():
    kernel = jnp.array([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])  # [C / G = 2, O = 4], C = 4, G = 2
    damage = expected_channel_damage(kernel, jnp.zeros(4), jnp.array([1.0, 1.0, 1.0, 2.0]), jnp.ones(4, bool))
    expected = np.array([[1, 5, 0, 0], [2, 6, 0, 0], [0, 0, 3, 14], [0, 0, 4, 16]])
    np.testing.assert_array_equal(damage, expected)
    np.testing.assert_allclose(normalize_damage(damage).sum(axis=1), 1.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("damage", "gate", "threshold", "expected"),
    [
        # One order for both groups, one sum per output: 1 and 3 are closed, 2 would carry its output over.
        pytest.param([[8, 2, 0, 0], [0, 0, 7, 3]], [1, 1, 1, 1], 0.32, [1, 0, 1, 0], id="one order"),
        pytest.param([[8, 2, 0, 0], [0, 0, 7, 3]], [1, 1, 1, 1], 0.25, [1, 0, 1, 1], id="one group closes"),
        # The second group does no damage: its last open channel in the order stays.
        pytest.param([[8, 2, 0, 0], [0, 0, 0, 0]], [1, 1, 1, 1], 0.1, [1, 1, 0, 1], id="dead group"),
        pytest.param([[8, 2, 0, 0], [0, 0, 0, 0]], [1, 1, 1, 0], 0.1, [1, 1, 1, 0], id="dead, one open"),
        pytest.param([[8, 2, 0, 0], [0, 0, 0, 0]], [1, 1, 0, 0], 0.1, [1, 1, 0, 0], id="closed group"),
        pytest.param([[0, 0, 0, 0], [0, 0, 0, 0]], [1, 1, 1, 1], 0.5, [1, 1, 1, 1], id="no damage at all"),
    ],
)
def test_each_group_keeps_an_open_channel(damage, gate, threshold, expected):
    normalized = normalize_damage(jnp.array(damage, jnp.float32))
    new, source = deallocate(normalized, jnp.array(gate, bool), jnp.zeros(4, jnp.int32), threshold, groups=2)
    np.testing.assert_array_equal(new, np.array(expected, bool))
    np.testing.assert_array_equal(source, np.where(expected, 0, -1))
    wanted, _ = oracle.deallocate(
        np.asarray(normalized), np.array(gate, bool), np.zeros(4, int), threshold, 2
    )
    np.testing.assert_array_equal(wanted, new)


@pytest.fixture(scope="module")
def grouped():
    layer = SelectiveConv(12, (3, 3), feature_group_count=4)
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 16))
    return layer, x, perturbed_variables(layer, x.shape, seed=1, closed=0.4, copies=0.3)


def test_filling_slots_does_not_change_the_function(grouped):
    layer, x, variables = grouped
    key = jax.random.key(1)
    rule = AllocationRule(threshold=0.1)
    closed, report = selconv_jax.reallocate(variables, key, AllocationRule(threshold=0.1, top_k=0))
    filled, same = selconv_jax.reallocate(variables, key, rule)
    assert report.deallocated == same.deallocated > 0
    slots = np.flatnonzero(same.layers[""].reallocated)
    assert len(slots) == (~closed["selectivity"]["gate"]).sum() > 0
    apply = jax.jit(lambda variables: layer.apply(variables, x, train=False))
    np.testing.assert_array_equal(apply(filled), apply(closed))
    assert np.abs(apply(variables) - apply(closed)).max() > 0
    # Sources lie in other groups too; every rewritten row lies in the slot's own.
    sources = np.asarray(filled["selectivity"]["source"])[slots]
    assert np.any(sources // 4 != slots // 4)
    for slot in slots:
        group = slice(3 * (slot // 4), 3 * (slot // 4) + 3)
        assert not filled["params"]["kernel"][:, :, slot % 4, group].any()
    rewritten = (filled["params"]["kernel"] != closed["params"]["kernel"]).any(axis=(0, 1))
    assert rewritten.sum() == 3 * len(slots)


def test_a_round_against_the_oracle(grouped):
    _, _, variables = grouped
    state = selconv_jax.layer_states(variables)[""]
    arrays = {name: np.asarray(getattr(state, name)) for name in oracle.Layer._fields}
    layer = oracle.Layer(**arrays)
    normalized = oracle.normalize(oracle.damage(layer.kernel, layer.scale, layer.bias, layer.gate))
    gate, source = oracle.deallocate(normalized, layer.gate, layer.source, 0.1, groups=4)
    new, report = selconv_jax.reallocate(variables, jax.random.key(1), AllocationRule(threshold=0.1))
    np.testing.assert_array_equal(report.layers[""].deallocated, layer.gate & ~gate)
    normalized = oracle.normalize(oracle.damage(layer.kernel, layer.scale, layer.bias, gate))
    best = oracle.candidates(oracle.scores(normalized, source), gate, 3)
    original = {origin if source[origin] == -1 else source[origin] for origin in best}
    after = selconv_jax.layer_states(new)[""]
    slots = np.flatnonzero(report.layers[""].reallocated)
    np.testing.assert_array_equal(slots, np.flatnonzero(~gate))
    assert set(np.asarray(after.source)[slots].tolist()) == original
    np.testing.assert_array_equal(np.delete(after.source, slots), np.delete(source, slots))


def test_depthwise_layers_never_close():
    layer = SelectiveConv(8, (3,), feature_group_count=8)
    variables = perturbed_variables(layer, (2, 6, 8), seed=0)
    variables["params"]["kernel"] = variables["params"]["kernel"].at[:, 0, 3].set(0)  # does no damage
    new, report = selconv_jax.reallocate(variables, jax.random.key(0), AllocationRule(threshold=0.999))
    assert report.deallocated == 0
    assert new["selectivity"]["gate"].all()


def test_optimizer_state_of_the_rewritten_rows(grouped):
    _, _, variables = grouped
    new, report = selconv_jax.reallocate(variables, jax.random.key(1), AllocationRule(threshold=0.1))
    masks = selconv_jax.rewritten_mask(new["params"], report)
    assert masks["kernel"].shape == (1, 1, 4, 12)
    slots = np.flatnonzero(report.layers[""].reallocated)
    expected = np.zeros((4, 12), bool)
    for slot in slots:
        expected[slot % 4, 3 * (slot // 4) : 3 * (slot // 4) + 3] = True
    np.testing.assert_array_equal(masks["kernel"][0, 0], expected)
    np.testing.assert_array_equal(np.flatnonzero(masks["scale"]), slots)
