"""Layers as other Flax layers are used: in `nn.Sequential`, with a mapped axis, with boxed parameters."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from jax.sharding import AxisType, PartitionSpec

import selconv_jax
from selconv_jax import AllocationRule, BatchNormReLUConv, SelectiveConv
from selconv_jax._bench.states import with_copies
from selconv_jax.nn import batch_statistics
from states import perturbed_variables

LAYERS = [BatchNormReLUConv(4, (3, 3)), SelectiveConv(4, (3, 3)), SelectiveConv(4, (3, 3), gate_only=True)]
X = jax.random.normal(jax.random.key(0), (8, 6, 6, 8)) + 1


def variables_of(layer, x=X):
    variables = perturbed_variables(layer, x.shape, seed=0)
    return with_copies(variables, 0.5, seed=0) if getattr(layer, "gate_only", None) is False else variables


@pytest.mark.parametrize("layer", LAYERS, ids=["plain", "selective", "gate_only"])
def test_mode_as_attribute_and_argument(layer):
    variables = variables_of(layer)
    for train in (False, True):
        expected = layer.apply(variables, X, train, mutable=["batch_stats"])
        chex.assert_trees_all_equal(
            layer.clone(train=train).apply(variables, X, mutable=["batch_stats"]), expected
        )
        # The argument counts, if both are given.
        chex.assert_trees_all_equal(
            layer.clone(train=not train).apply(variables, X, train, mutable=["batch_stats"]), expected
        )
    with pytest.raises(ValueError, match="pass train=True or train=False"):
        layer.apply(variables, X)


def test_in_a_sequential_model_reallocated_and_compacted():
    def model(train):
        return nn.Sequential(
            [nn.Conv(8, (3, 3)), SelectiveConv(8, (3, 3), train=train), SelectiveConv(4, (1, 1), train=train)]
        )

    variables = model(False).init(jax.random.key(1), X)
    _, changed = model(True).apply(variables, X, mutable=["batch_stats"])
    variables, report = selconv_jax.reallocate(
        {**variables, **changed}, jax.random.key(2), AllocationRule(threshold=0.2, top_k=1)
    )
    assert report.deallocated > 0
    expected = model(False).apply(variables, X)
    small, small_variables = selconv_jax.compact(model(False), variables, X)
    np.testing.assert_allclose(small.apply(small_variables, X), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("known", [False, True], ids=["own", "known"])
@pytest.mark.parametrize("layer", LAYERS, ids=["plain", "selective", "gate_only"])
def test_statistics_over_a_mapped_axis_are_those_of_the_whole_batch(layer, known):
    variables = variables_of(layer)
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Auto,))
    whole, split = PartitionSpec(), PartitionSpec("batch")

    def run(params, x, axis_name):
        statistics = batch_statistics(x, axis_name) if known else None
        y, changed = layer.clone(axis_name=axis_name).apply(
            {**variables, "params": params}, x, True, statistics, mutable=["batch_stats"]
        )
        return jnp.sum(jnp.sin(y)), changed

    def part(params, x):
        (loss, changed), gradient = jax.value_and_grad(
            lambda params, x: (lambda out: (jax.lax.psum(out[0], "batch"), out[1]))(run(params, x, "batch")),
            has_aux=True,
        )(params, x)
        return loss, changed, gradient

    mapped = jax.jit(jax.shard_map(part, mesh=mesh, in_specs=(whole, split), out_specs=whole))
    (loss, changed), gradient = jax.value_and_grad(run, has_aux=True)(variables["params"], X, None)
    chex.assert_trees_all_close(
        mapped(variables["params"], X), (loss, changed, gradient), rtol=1e-4, atol=1e-4
    )
    # The same on the axis of a plain vmap.
    y, stats = jax.vmap(
        lambda x: layer.clone(axis_name="batch").apply(variables, x, True, mutable=["batch_stats"]),
        axis_name="batch",
    )(X.reshape(4, 2, *X.shape[1:]))
    expected, expected_stats = layer.apply(variables, X, True, mutable=["batch_stats"])
    np.testing.assert_allclose(y.reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(jax.tree.map(lambda leaf: leaf[3], stats), expected_stats, rtol=1e-5)


def test_a_layer_with_an_axis_is_initialized_outside_of_it():
    layer = SelectiveConv(4, (3, 3), axis_name="batch")
    chex.assert_trees_all_equal(
        layer.init(jax.random.key(0), X, train=True),
        SelectiveConv(4, (3, 3)).init(jax.random.key(0), X, train=True),
    )


class Synchronized(nn.Module):
    """Layers, or convolutions that can become such, with statistics over a mapped axis."""

    kind: str

    @nn.compact
    def __call__(self, x, train):
        for features in (8, 6):
            if self.kind == "selective":
                x = SelectiveConv(features, (3, 3), axis_name="batch")(x, train)
            else:
                x = nn.relu(nn.BatchNorm(not train, momentum=0.9, axis_name="batch")(x))
                x = nn.Conv(features, (3, 3), use_bias=False)(x)
        return nn.BatchNorm(not train, axis_name="batch")(x)


@pytest.mark.parametrize("kind", ["selective", "ordinary"])
def test_networks_with_an_axis_are_converted_and_compacted_outside_of_it(kind):
    network = Synchronized(kind)
    variables = network.init(jax.random.key(0), X, train=False)

    def run(network, variables):
        return jax.vmap(
            lambda x: network.apply(variables, x, train=True, mutable=["batch_stats"])[0], axis_name="batch"
        )(X[:, None])

    expected = run(network, variables)
    if kind == "ordinary":
        network, variables, converted, _ = selconv_jax.selectivize_model(network, variables, X)
        assert len(converted) == 2
        np.testing.assert_allclose(run(network, variables), expected, rtol=1e-4, atol=1e-4)
    variables, report = selconv_jax.reallocate(
        variables, jax.random.key(1), AllocationRule(threshold=0.3, top_k=0)
    )
    assert report.deallocated
    small, small_variables = selconv_jax.compact(network, variables, X)
    assert small.layouts
    np.testing.assert_allclose(run(small, small_variables), run(network, variables), rtol=1e-4, atol=1e-4)


def test_boxed_parameters_are_reallocated_and_stay_boxed():
    layer = SelectiveConv(
        4, (3, 3), kernel_init=nn.with_partitioning(nn.initializers.normal(), (None, None, None, "model"))
    )
    boxed = layer.init(jax.random.key(0), X, train=False)
    rule = AllocationRule(threshold=0.2)
    expected, expected_report = selconv_jax.reallocate(meta.unbox(boxed), jax.random.key(1), rule)
    new, report = selconv_jax.reallocate(boxed, jax.random.key(1), rule)
    assert report == expected_report
    assert new["params"]["kernel"].names == (None, None, None, "model")
    chex.assert_trees_all_equal(meta.unbox(new), expected)
    mask = selconv_jax.rewritten_mask(boxed["params"], report)
    chex.assert_trees_all_equal(
        jax.tree.leaves(mask), jax.tree.leaves(selconv_jax.rewritten_mask(expected["params"], report))
    )
