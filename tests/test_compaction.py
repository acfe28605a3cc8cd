"""Compacted networks compute what the whole ones do, in evaluation and training, whatever is closed."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import freeze
from hypothesis import strategies as st

import selconv_jax
from compactions import (
    NETWORKS,
    SHAPE,
    assert_close_trees,
    assert_equal_trees,
    assert_same_function,
    close,
    images,
    quick_jit,
)
from selconv_jax import AllocationRule, ConfigError
from selconv_jax.analysis._counting import count_parameters
from selconv_jax.models import DenseNet
from states import perturbed_variables


def shapes(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


@pytest.mark.parametrize(
    "family",
    ["densenet_bc"]
    + [
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("densenet", "preresnet", "resnext", "condensenet")
    ],
)
@hypothesis.settings(
    max_examples=2, deadline=None, derandomize=True, phases=[hypothesis.Phase.generate], database=None
)
@hypothesis.given(
    seed=st.integers(0, 2**31),
    closed=st.sampled_from((0.2, 0.6, 1.0)),
    copies=st.sampled_from((0.0, 0.5)),
    multiple=st.sampled_from((1, 4)),
)
def test_same_function(family, seed, closed, copies, multiple):
    """With every share of closed channels, the least possible number of open ones included."""
    model = NETWORKS[family]
    variables = perturbed_variables(model, SHAPE, seed, closed=closed, copies=copies)
    plan, small = assert_same_function(model, variables, multiple=multiple)
    assert count_parameters(small["params"]) < count_parameters(variables["params"])
    assert "selectivity" not in small
    init = jax.eval_shape(lambda: plan.model.init(jax.random.key(0), images(), train=False))
    assert shapes(init) == shapes(small)


@pytest.mark.parametrize("family", NETWORKS)
def test_nothing_closed(family):
    model = NETWORKS[family]
    variables = perturbed_variables(model, SHAPE, seed=0)
    small_model, small = selconv_jax.compact(model, variables)
    assert small_model.layouts == small_model.widths == ()
    assert_equal_trees(small, variables)


def test_a_plain_network_stays_plain():
    model = DenseNet(5, (1, 1), growth=4, variant="plain")
    variables = perturbed_variables(model, SHAPE, seed=0)
    small_model, small = selconv_jax.compact(model, variables)
    assert small_model.layouts == ()
    assert_equal_trees(small, variables)
    programs = [
        jax.jit(lambda v, x, m=m: m.apply(v, x, train=False)).lower(variables, images()).as_text()
        for m in (model, small_model)
    ]
    assert programs[0] == programs[1]


@pytest.mark.parametrize("family", ["densenet_bc", "resnext"])
def test_every_gate_of_a_block_closed(family):
    """Not even one channel open, which re-allocation never does."""
    model = NETWORKS[family]
    variables = perturbed_variables(model, SHAPE, seed=1, closed=0.2)
    for name, layer in variables["selectivity"]["block2_layer1"].items():
        variables = close(variables, f"block2_layer1/{name}", np.arange(len(layer["gate"])))
    assert_same_function(model, variables)


def test_dropout_and_lower_precision():
    model = DenseNet(5, (1, 1), growth=4, compression=0.5, dropout_rate=0.2, dtype=jnp.bfloat16)
    variables = perturbed_variables(model, SHAPE, seed=0, closed=0.4, copies=0.3)
    plan = selconv_jax.plan_compaction(model, variables, compare=False)
    assert plan.model.dtype == plan.frozen_model().dtype == jnp.bfloat16
    x = images().astype(jnp.bfloat16)

    def run(v):
        key = jax.random.key(1)
        y, changed = plan.model.apply(
            plan.take(v), x, train=True, mutable=["batch_stats"], rngs={"dropout": key}
        )
        return y, changed, plan.model.apply(plan.take(v), x, train=False)

    y, changed, evaluated = quick_jit(run)(variables)
    expected = quick_jit(lambda v: model.apply(v, x, train=False))(variables)
    np.testing.assert_allclose(evaluated, expected, rtol=0.05, atol=0.05 * np.abs(expected).max())
    assert np.isfinite(y).all()
    assert shapes(changed["batch_stats"]) == shapes(plan.take(variables)["batch_stats"])


def test_frozen_model_has_the_variables_of_the_whole():
    model = NETWORKS["densenet_bc"]
    variables = perturbed_variables(model, SHAPE, seed=3, closed=0.4, copies=0.3)
    plan = selconv_jax.plan_compaction(model, variables, compare=False)
    frozen = plan.frozen_model()

    def step(network, variables):
        y, changed = network.apply(variables, images(), train=True, mutable=["batch_stats"])
        return y, changed, network.apply(variables, images(), train=False)

    y, changed, evaluated = quick_jit(lambda v: step(frozen, v))(variables)
    whole_y, whole_changed, whole_evaluated = quick_jit(lambda v: step(model, v))(variables)
    np.testing.assert_allclose(y, whole_y, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(evaluated, whole_evaluated, rtol=1e-4, atol=1e-5)
    assert shapes(changed) == shapes(whole_changed)
    open_ = np.asarray(variables["selectivity"]["block1_layer1"]["conv1"]["gate"])
    mean, whole_mean = (c["batch_stats"]["block1_layer1"]["conv1"]["mean"] for c in (changed, whole_changed))
    np.testing.assert_allclose(mean[open_], whole_mean[open_], rtol=1e-5, atol=1e-6)
    kept = variables["batch_stats"]["block1_layer1"]["conv1"]["mean"]
    np.testing.assert_array_equal(mean[~open_], kept[~open_])


@pytest.mark.parametrize("family", ["densenet_bc", pytest.param("condensenet", marks=pytest.mark.slow)])
def test_frozen_model_drops_out_what_the_whole_does(family):
    model = NETWORKS[family].clone(dropout_rate=0.5)
    variables = perturbed_variables(model, SHAPE, seed=3, closed=0.4, copies=0.3)
    frozen = selconv_jax.plan_compaction(model, variables, compare=False).frozen_model()

    def trained(network):
        options = {"train": True, "mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(1)}}
        return quick_jit(lambda v: network.apply(v, images(), **options)[0])(variables)

    expected = trained(model)
    np.testing.assert_allclose(trained(frozen), expected, rtol=1e-4, atol=1e-4)
    assert np.abs(expected - trained(NETWORKS[family])).max() > 0.1


def test_training_on_goes_as_the_whole_network_would():
    """After training with rounds of re-allocation; momentum is taken along."""
    model = NETWORKS["preresnet"]
    variables = perturbed_variables(model, SHAPE, seed=5)
    labels = jnp.arange(SHAPE[0]) % 5
    optimizer = optax.sgd(0.01, momentum=0.9, nesterov=True)

    def step(network, variables, momentum):
        def loss(params):
            y, changed = network.apply(
                {**variables, "params": params}, images(), train=True, mutable=["batch_stats"]
            )
            return optax.softmax_cross_entropy_with_integer_labels(y, labels).mean(), changed

        grads, changed = jax.grad(loss, has_aux=True)(variables["params"])
        changes, momentum = optimizer.update(grads, momentum, variables["params"])
        params = optax.apply_updates(variables["params"], changes)
        return {**variables, **changed, "params": params}, momentum

    whole_step = quick_jit(lambda v, m: step(model, v, m))
    whole, state = variables, optimizer.init(variables["params"])
    for index in range(2):
        whole, report = selconv_jax.reallocate(whole, jax.random.key(index), AllocationRule(threshold=0.5))
        for _ in range(2):
            whole, state = whole_step(whole, state)
    assert report.reallocated > 0
    plan = selconv_jax.plan_compaction(model, whole, multiple=8, compare=False)
    assert any(layout.copied for _, layout in plan.model.layouts)
    assert any(layout.idle for _, layout in plan.model.layouts)
    small = plan.take(whole)
    trace = plan.take({"params": state[0].trace})["params"]
    small_state = (state[0]._replace(trace=trace), *state[1:])
    small_step = quick_jit(lambda v, m: step(plan.model, v, m))
    for _ in range(2):
        whole, state = whole_step(whole, state)
        small, small_state = small_step(small, small_state)
    # Idle rows, which are zero in what is taken, have stayed zero.
    assert_close_trees(small["params"], plan.take(whole)["params"], 1e-4)
    assert_close_trees(plan.take(plan.put(whole, small)), small, 1e-7)


def test_take_and_put_of_other_trees():
    model = NETWORKS["resnext"]
    variables = perturbed_variables(model, SHAPE, seed=7, closed=0.5, copies=0.5)
    plan = selconv_jax.plan_compaction(model, variables, compare=False)
    frozen = plan.take(freeze(variables))
    assert type(frozen) is type(freeze({}))
    assert_equal_trees(frozen, freeze(plan.take(variables)))
    only = plan.take({"params": variables["params"]})
    assert list(only) == ["params"]
    doubled = jax.tree.map(lambda leaf: 2 * leaf, only)
    whole = plan.put(variables, doubled)
    assert_equal_trees(plan.take(whole)["params"], doubled["params"])
    assert whole["selectivity"] == variables["selectivity"]
    untouched = plan.put(variables, jax.tree.map(jnp.zeros_like, only))
    gate = variables["selectivity"]["block1_layer1"]["conv1"]["gate"]
    scale = untouched["params"]["block1_layer1"]["conv1"]["scale"]
    np.testing.assert_array_equal(
        scale, np.where(gate, 0, variables["params"]["block1_layer1"]["conv1"]["scale"])
    )


def test_refusals():
    model = NETWORKS["densenet"]
    variables = perturbed_variables(model, SHAPE, seed=0, closed=0.3)
    for multiple in (0, 1.5, True):
        with pytest.raises(ConfigError, match="multiple is"):
            selconv_jax.compact(model, variables, multiple=multiple)
    with pytest.raises(ConfigError, match="model is a function"):
        selconv_jax.compact(lambda x: x, variables)
    small_model, small = selconv_jax.compact(model, variables)
    with pytest.raises(ConfigError, match="already compacted"):
        selconv_jax.compact(small_model, small)
    layer = selconv_jax.SelectiveConv(4, (3, 3))
    with pytest.raises(ConfigError, match="pass its inputs"):
        selconv_jax.compact(layer, variables)
    with pytest.raises(ValueError, match="no params/stem/kernel"):
        selconv_jax.compact(model, {"params": {}})
    with pytest.raises(ValueError, match="gates and sources are traced"):
        jax.jit(lambda v: selconv_jax.compact(model, v)[1])(variables)
    plan = selconv_jax.plan_compaction(model, variables, compare=False)
    other = perturbed_variables(DenseNet(5, (2, 1), growth=8), SHAPE, seed=0)
    with pytest.raises(ValueError, match=r"has shape .*, which is not that of the network this plan"):
        plan.take(other)
    with pytest.raises(ValueError, match="selectivity/block1_layer1/conv1/gate, for which"):
        plan.put(variables, {"selectivity": variables["selectivity"]})
