"""Re-allocation of whole models: what it may change, what it must not, and that it compiles once."""

import dataclasses
import operator

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from flax.core import FrozenDict, freeze
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import selconv_jax
from selconv_jax import AllocationRule, SelectiveConv
from selconv_jax.functional import expected_channel_damage
from selconv_jax.models import DenseNet
from selconv_jax.transforms import _reallocation as transform
from states import perturbed_variables

SHAPE = (2, 16, 16, 3)


@pytest.fixture(scope="module")
def model():
    return DenseNet(num_classes=10, blocks=(1, 1, 1), growth=4, compression=0.5)


@pytest.fixture(scope="module")
def variables(model):
    return perturbed_variables(model, SHAPE, seed=3)


def test_finds_every_layer_and_says_what_it_did(variables):
    states = jax.device_get(selconv_jax.layer_states(variables))
    assert sorted(states) == [
        "block1_layer1/conv1",
        "block1_layer1/conv2",
        "block2_layer1/conv1",
        "block2_layer1/conv2",
        "block3_layer1/conv1",
        "block3_layer1/conv2",
        "transition1",
        "transition2",
    ]
    new, report = selconv_jax.reallocate(variables, jax.random.key(0), AllocationRule(threshold=0.3))
    after, report = jax.device_get((selconv_jax.layer_states(new), report))
    for name, layer in report.layers.items():
        before = states[name]
        np.testing.assert_array_equal(
            after[name].gate, (before.gate & ~layer.deallocated) | layer.reallocated, err_msg=name
        )
        assert layer.open == after[name].gate.sum()
        if name.endswith("conv2"):  # gate-only
            assert not layer.reallocated.any()
            assert layer.copies == 0
        else:
            assert layer.copies == (after[name].source >= 0).sum()
    assert report.channels == sum(state.gate.size for state in states.values())
    assert 0 < report.reallocated < report.deallocated
    assert report.open == sum(int(state.gate.sum()) for state in after.values())
    assert report.copies == report.reallocated


def test_structure_shapes_dtypes_and_shardings_stay(variables):
    mesh = Mesh(np.array(jax.devices()[:2]), ("batch",))
    placed = jax.device_put(variables, NamedSharding(mesh, PartitionSpec()))
    new, _ = selconv_jax.reallocate(placed, jax.random.key(0), AllocationRule(threshold=0.3))
    chex.assert_trees_all_equal_shapes_and_dtypes(new, placed)
    for old, leaf in zip(jax.tree.leaves(placed), jax.tree.leaves(new), strict=True):
        assert leaf.sharding.is_equivalent_to(old.sharding, old.ndim)


@pytest.mark.parametrize("inner", [FrozenDict, dict])
def test_types_of_mappings_and_empty_ones_stay(variables, inner):
    mixed = {**variables, "params": inner({**variables["params"], "empty": {}})}
    new, report = selconv_jax.reallocate(mixed, jax.random.key(0), AllocationRule(threshold=0.3))
    assert report.reallocated > 0
    assert jax.tree.structure(new) == jax.tree.structure(mixed)
    assert type(new["params"]) is inner
    assert "empty" in new["params"]


def test_wide_layers_may_be_sharded(variables):
    mesh = Mesh(np.array(jax.devices()[:4]), ("model",))
    kernel = variables["params"]["block1_layer1"]["conv1"]["kernel"]
    sharding = NamedSharding(mesh, PartitionSpec(None, None, None, "model"))
    replicated = NamedSharding(mesh, PartitionSpec())
    placed = jax.device_put(variables, replicated)
    placed["params"]["block1_layer1"]["conv1"]["kernel"] = jax.device_put(kernel, sharding)
    new, report = selconv_jax.reallocate(placed, jax.random.key(0), AllocationRule(threshold=0.3))
    assert new["params"]["block1_layer1"]["conv1"]["kernel"].sharding.is_equivalent_to(sharding, 4)
    expected, same = selconv_jax.reallocate(variables, jax.random.key(0), AllocationRule(threshold=0.3))
    assert report.deallocated == same.deallocated > 0
    chex.assert_trees_all_close(new, expected, rtol=1e-6)


def test_other_leaves_pass_through_untouched(variables):
    extra = {**variables, "notes": {"version": jnp.ones(3)}}
    new, _ = selconv_jax.reallocate(extra, jax.random.key(0), AllocationRule(threshold=0.3))
    assert new["notes"]["version"] is extra["notes"]["version"]
    assert new["params"]["stem"]["kernel"] is variables["params"]["stem"]["kernel"]
    assert (
        new["params"]["classifier"]["linear"]["bias"] is variables["params"]["classifier"]["linear"]["bias"]
    )


def test_frozen_variables_stay_frozen(variables):
    new, _ = selconv_jax.reallocate(freeze(variables), jax.random.key(0), AllocationRule(threshold=0.3))
    expected, _ = selconv_jax.reallocate(variables, jax.random.key(0), AllocationRule(threshold=0.3))
    assert type(new) is type(freeze({}))
    chex.assert_trees_all_equal(new.unfreeze(), expected)


def test_compiles_once_per_model_and_allocation(variables, monkeypatch):
    traces = []
    original = transform._layer_round
    monkeypatch.setattr(transform, "_layer_round", lambda *args: traces.append(1) or original(*args))
    transform._jitted.cache_clear()
    rule = AllocationRule(threshold=0.123)
    for seed in range(3):
        variables, _ = selconv_jax.reallocate(variables, jax.random.key(seed), rule)
        # Nor do other numbers compile anew.
        rule = AllocationRule(threshold=0.2 + seed / 10, shift_range=1.0 + seed)
    assert len(traces) == len(selconv_jax.layer_states(variables))


def test_inside_of_jit_equals_outside(variables):
    rule = AllocationRule(threshold=0.3, max_copies=2)
    outside, report = selconv_jax.reallocate(variables, jax.random.key(5), rule)
    inside, same = jax.jit(lambda v, k: selconv_jax.reallocate(v, k, rule))(variables, jax.random.key(5))
    chex.assert_trees_all_equal(inside, outside)
    chex.assert_trees_all_equal(same, report)


def test_arrays_of_numpy_under_a_traced_key(variables):
    rule, key = AllocationRule(threshold=0.3), jax.random.key(0)
    expected, _ = selconv_jax.reallocate(variables, key, rule)
    host = jax.device_get(variables)
    chex.assert_trees_all_equal(
        jax.jit(lambda key: selconv_jax.reallocate(host, key, rule)[0])(key), expected
    )


def test_threshold_as_an_array(variables):
    expected, report = selconv_jax.reallocate(variables, jax.random.key(5), AllocationRule(threshold=0.3))
    for threshold in (np.float32(0.3), jnp.asarray(0.3)):
        new, same = selconv_jax.reallocate(variables, jax.random.key(5), AllocationRule(threshold=threshold))
        chex.assert_trees_all_equal(new, expected)
        assert same == report

    def closed(threshold):
        return selconv_jax.reallocate(variables, jax.random.key(5), AllocationRule(threshold=threshold))[
            1
        ].deallocated

    assert jax.jit(closed)(jnp.asarray(0.3)) == report.deallocated > 0
    assert jax.jit(jax.vmap(closed))(jnp.array([0.3, 1.0])).tolist() == [report.deallocated, 0]


@pytest.mark.parametrize("threshold", [0.3, np.float32(0.3)])
def test_nothing_is_transferred_implicitly(variables, threshold):
    expected = selconv_jax.reallocate(variables, jax.random.key(5), AllocationRule(threshold=0.3))
    key = jax.random.key(5)
    with jax.transfer_guard("disallow"):
        found = selconv_jax.reallocate(variables, key, AllocationRule(threshold=threshold))
        assert found[1].deallocated > 0
    chex.assert_trees_all_equal(found[0], expected[0])


def test_rules_of_single_layers(variables):
    """Each layer is re-allocated as by its rule alone, with the same draws; others stay the same arrays."""
    key, names = jax.random.key(5), list(selconv_jax.layer_states(variables))
    rules = {names[0]: AllocationRule(threshold=0.5), names[2]: AllocationRule(threshold=0.2, top_k=0)}
    new, report = selconv_jax.reallocate(variables, key, rules.get)
    assert list(report.layers) == list(rules)
    assert report.deallocated > report.reallocated > 0
    states, before = selconv_jax.layer_states(new), selconv_jax.layer_states(variables)
    for name in names:
        if name not in rules:
            assert all(map(operator.is_, jax.tree.leaves(states[name]), jax.tree.leaves(before[name])))
            continue
        alone, alone_report = selconv_jax.reallocate(variables, key, rules[name])
        chex.assert_trees_all_equal(states[name], selconv_jax.layer_states(alone)[name])
        assert report.layers[name] == alone_report.layers[name]
    traced = jax.jit(lambda variables: selconv_jax.reallocate(variables, key, rules.get))(variables)
    chex.assert_trees_all_equal(traced[0], new)
    assert traced[1] == report


def test_the_same_rule_for_every_layer_as_a_function(variables):
    rule = AllocationRule(threshold=0.3, max_copies=1)
    by_function = selconv_jax.reallocate(variables, jax.random.key(5), lambda path: dataclasses.replace(rule))
    chex.assert_trees_all_equal(by_function, selconv_jax.reallocate(variables, jax.random.key(5), rule))


def test_a_report_is_compared_counted_and_stored(variables):
    def run(threshold):
        return selconv_jax.reallocate(variables, jax.random.key(5), AllocationRule(threshold=threshold))[1]

    report = run(0.3)
    assert report == run(0.3) != run(0.0)
    totals = ("deallocated", "reallocated", "channels", "open", "copies")
    traced = jax.jit(lambda report: [getattr(report, name) for name in totals])(report)
    assert traced == [getattr(report, name) for name in totals]
    stored = serialization.to_bytes(report)
    assert serialization.from_bytes(run(0.0), stored) == report


def test_replicas_are_refused_and_stay_alike_where_they_are_traced(variables):
    rule = AllocationRule(threshold=0.3)
    replicas = jax.tree.map(lambda leaf: jnp.asarray(np.stack([leaf, leaf])), variables)
    # As where each device has seen a batch of its own.
    moved = jax.tree.map(lambda leaf: leaf.at[1].add(0.5), replicas["batch_stats"])
    for given in (replicas, {**replicas, "batch_stats": moved}):
        with pytest.raises(ValueError, match=r"2 replicas of one model.*flax.jax_utils.unreplicate"):
            selconv_jax.reallocate(given, jax.random.key(0), rule)
    new, report = jax.jit(lambda v: selconv_jax.reallocate(v, jax.random.key(0), rule))(replicas)
    assert report.reallocated > 0
    for leaf in jax.tree.leaves((new, report)):
        np.testing.assert_array_equal(leaf[0], leaf[1])
    run = jax.vmap(lambda v: selconv_jax.reallocate(v, jax.random.key(0), rule))
    mapped, _ = jax.jit(run)(replicas)
    for leaf in jax.tree.leaves(mapped):
        np.testing.assert_array_equal(leaf[0], leaf[1])


@pytest.mark.parametrize("name", ["scale", "bias", "kernel"])
def test_a_layer_with_a_parameter_that_is_not_a_number_is_left_alone(name):
    layer = SelectiveConv(4, (3, 3))
    variables = perturbed_variables(layer, (2, 6, 6, 16), seed=0)
    _, report = selconv_jax.reallocate(variables, jax.random.key(0), AllocationRule(threshold=0.3))
    assert report.deallocated > 0
    leaf = variables["params"][name]
    broken = leaf.at[..., 3, :].set(jnp.nan) if name == "kernel" else leaf.at[3].set(jnp.nan)
    broken = {**variables, "params": {**variables["params"], name: broken}}
    new, report = selconv_jax.reallocate(broken, jax.random.key(0), AllocationRule(threshold=0.3))
    assert report.deallocated == report.reallocated == 0
    chex.assert_trees_all_equal(new, broken)


def test_draws_depend_on_key_and_path_only(variables):
    states = selconv_jax.layer_states(variables)
    rule = AllocationRule(threshold=0.3)
    _, report = selconv_jax.reallocate(variables, jax.random.key(1), rule)
    other, _ = selconv_jax.reallocate(variables, jax.random.key(2), rule)
    new, _ = selconv_jax.reallocate(variables, jax.random.key(1), rule)
    # The same layer alone, under its path, draws what it drew among the others.
    part = {
        collection: {"block2_layer1": {"conv1": leaves["block2_layer1"]["conv1"]}}
        for collection, leaves in variables.items()
    }
    alone, _ = selconv_jax.reallocate(part, jax.random.key(1), rule)
    pick = ("params", "block2_layer1", "conv1", "shift")
    np.testing.assert_array_equal(at(alone, *pick), at(new, *pick))
    filled = report.layers["block2_layer1/conv1"].reallocated
    assert filled.any()
    assert np.all(np.asarray(at(other, *pick) != at(new, *pick)).all(axis=1) == filled)
    assert states["block2_layer1/conv1"].shift.shape == at(new, *pick).shape


def test_threshold_0_and_1(variables):
    _, none = selconv_jax.reallocate(variables, jax.random.key(0), AllocationRule(threshold=1.0))
    assert none.deallocated == 0
    _, zero = selconv_jax.reallocate(variables, jax.random.key(0), AllocationRule(threshold=0.0))
    for name, state in selconv_jax.layer_states(variables).items():
        damage = expected_channel_damage(state.kernel, state.scale, state.bias, state.gate)
        harmless = np.asarray((damage == 0).all(axis=0))
        np.testing.assert_array_equal(zero.layers[name].deallocated, harmless, err_msg=name)
    assert 0 < zero.deallocated < zero.channels


def test_top_k_0_only_closes(variables):
    new, report = selconv_jax.reallocate(variables, jax.random.key(0), AllocationRule(threshold=0.3, top_k=0))
    assert report.deallocated > 0
    assert report.reallocated == 0
    assert report.open == report.channels - report.deallocated
    assert selconv_jax.required_capacity(new) == 0.0


def test_required_capacity_is_the_largest_fraction(variables):
    new, report = selconv_jax.reallocate(variables, jax.random.key(0), AllocationRule(threshold=0.3))
    shares = [int(layer.copies) / layer.deallocated.size for layer in report.layers.values()]
    assert selconv_jax.required_capacity(new) == pytest.approx(max(shares), rel=1e-6)
    assert max(shares) > 0


def test_a_single_layer_is_a_model():
    layer = SelectiveConv(features=4, kernel_size=(3,))
    variables = layer.init(jax.random.key(0), jnp.ones((1, 8, 16)), train=False)
    new, report = selconv_jax.reallocate(variables, jax.random.key(1), AllocationRule(threshold=0.2))
    assert list(report.layers) == [""]
    assert report.deallocated == report.reallocated == (new["selectivity"]["source"] >= 0).sum() > 0


def test_uncommitted_arrays_stay_uncommitted(variables):
    """So that they may join a batch on any mesh, and the step does not compile anew."""
    assert not variables["params"]["block1_layer1"]["conv1"]["kernel"].committed
    new, _ = selconv_jax.reallocate(variables, jax.random.key(0), AllocationRule(threshold=0.3))
    assert not any(leaf.committed for leaf in jax.tree.leaves(new))


def test_layers_of_other_dimensions_leave_the_draws():
    one, two = (
        perturbed_variables(SelectiveConv(4, (3,) * rank), (2, *(6,) * rank, 12), seed=0) for rank in (1, 2)
    )
    together = {name: {"one": one[name], "two": two[name]} for name in one}
    rule = AllocationRule(threshold=0.2)
    new, report = selconv_jax.reallocate(together, jax.random.key(0), rule)
    alone = {name: {"one": leaves} for name, leaves in one.items()}
    expected, _ = selconv_jax.reallocate(alone, jax.random.key(0), rule)
    assert report.layers["one"].reallocated.any()
    chex.assert_trees_all_equal(new["params"]["one"], expected["params"]["one"])


def test_random_sources_are_any_open_channels():
    layer = SelectiveConv(4, (3, 3))
    variables = perturbed_variables(layer, (2, 6, 6, 40), seed=0)
    variables["selectivity"]["gate"] = jnp.arange(40) < 10  # 30 slots
    variables["params"]["kernel"] = variables["params"]["kernel"].at[:, :, 3].set(0)  # scores 0

    def sources(key, source, **options):
        given = {**variables, "selectivity": {**variables["selectivity"], "source": jnp.array(source)}}
        new, report = selconv_jax.reallocate(given, jax.random.key(key), AllocationRule(**options))
        assert report.deallocated == 0
        return np.asarray(new["selectivity"]["source"])[10:]

    own = [-1] * 40
    # Threshold 1 closes nothing, so that channel 3 stays open.
    drawn = np.concatenate([sources(key, own, threshold=1.0, random_sources=True) for key in range(30)])
    counts = np.bincount(drawn, minlength=40)
    assert counts[10:].sum() == 0
    # Chi-square with 9 degrees of freedom: above 33.7 once in 10,000 keys.
    assert np.sum(np.square(counts[:10] - 90) / 90) < 33.7
    assert len(set(sources(0, own, threshold=1.0).tolist())) <= 3
    # Channels 0 and 1 read channel 2: more than one copy excludes all three.
    copies = [2, 2] + [-1] * 38
    drawn = sources(0, copies, threshold=1.0, random_sources=True, max_copies=1)
    assert set(drawn.tolist()) == set(range(3, 10))
    assert (sources(0, own, threshold=1.0, random_sources=True, top_k=0) == -1).all()


def test_narrow_parameters_decide_like_wide_ones():
    layer = SelectiveConv(8, (3, 3), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    x = jnp.ones((1, 40, 40, 16), jnp.bfloat16)
    variables = perturbed_variables(layer, x.shape, seed=0)
    new, report = selconv_jax.reallocate(variables, jax.random.key(0), AllocationRule(threshold=0.2))
    assert new["params"]["kernel"].dtype == jnp.bfloat16
    wide = jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf, variables
    )
    _, expected = selconv_jax.reallocate(wide, jax.random.key(0), AllocationRule(threshold=0.2))
    assert report.deallocated == expected.deallocated > 0
    np.testing.assert_array_equal(report.layers[""].deallocated, expected.layers[""].deallocated)


def test_allocation_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        AllocationRule().threshold = 0.5


def at(tree, *path):
    for key in path:
        tree = tree[key]
    return tree
