"""From plain networks to selective ones: the same function, and refusals by name."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze

import selconv_jax
from selconv_jax import AllocationRule, BatchNormReLUConv, SelectiveConv, selectivize
from selconv_jax.models import DenseNet
from states import perturbed_variables

SHAPE = (2, 16, 16, 3)


def network(variant):
    return DenseNet(num_classes=10, blocks=(1, 1), growth=4, variant=variant)


def template_of(model, shape):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.ones(shape), train=False))


@pytest.fixture(scope="module")
def plain():
    return perturbed_variables(network("plain"), SHAPE, seed=1)


@pytest.mark.parametrize("variant", ["selective", "gate_only"])
def test_the_twin_computes_the_same(plain, variant):
    twin = network(variant)
    template = template_of(twin, SHAPE)
    variables = selectivize(plain, template)
    chex.assert_trees_all_equal_shapes_and_dtypes(variables, dict(template))
    images = jax.random.normal(jax.random.key(0), SHAPE)
    expected = jax.jit(lambda variables: network("plain").apply(variables, images, train=False))(plain)
    actual = jax.jit(lambda variables: twin.apply(variables, images, train=False))(variables)
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)
    assert np.abs(expected).max() > 0
    for state in selconv_jax.layer_states(variables).values():
        assert state.gate.all()
        assert state.source is None or ((state.source == -1).all() and not state.shift.any())
    kernel = variables["params"]["stem"]["kernel"]
    assert kernel is plain["params"]["stem"]["kernel"]
    _, report = selconv_jax.reallocate(variables, jax.random.key(0), AllocationRule(threshold=0.3))
    assert report.deallocated > 0


def test_stacked_and_frozen_variables():
    layer = BatchNormReLUConv(4, (3, 3), feature_group_count=2)
    plain = perturbed_variables(layer, (1, 6, 6, 8), seed=0)
    template = template_of(SelectiveConv(4, (3, 3), feature_group_count=2), (1, 6, 6, 8))
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), plain)
    stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((3, *leaf.shape), leaf.dtype), dict(template))
    variables = selectivize(freeze(stack), freeze(stacked))
    assert type(variables) is type(freeze({}))
    assert variables["params"]["shift"].shape == (3, 8, 2)
    assert variables["selectivity"]["source"].shape == (3, 8)


def test_renamed_variables_of_a_flax_network():
    """The example of the documentation."""

    class Usual(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
            return nn.Conv(4, (3, 3), use_bias=False)(x)

    shape = (2, 6, 6, 5)
    old = perturbed_variables(Usual(), shape, seed=0)
    params, stats = old["params"], old["batch_stats"]
    plain = {
        "params": {"kernel": params["Conv_0"]["kernel"], **params["BatchNorm_0"]},
        "batch_stats": stats["BatchNorm_0"],
    }
    twin = SelectiveConv(4, (3, 3))
    x = jax.random.normal(jax.random.key(0), shape)
    variables = selectivize(plain, template_of(twin, shape))
    actual = jax.jit(lambda: twin.apply(variables, x, train=False))()
    expected = jax.jit(lambda: Usual().apply(old, x, train=False))()
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_misfits_are_listed(plain):
    wider = template_of(DenseNet(num_classes=10, blocks=(1, 2), growth=4, variant="selective"), SHAPE)
    with pytest.raises(ValueError, match=r"missing: \S*block2_layer2/conv.*; and \d+ more") as caught:
        selectivize(plain, wider)
    assert str(caught.value).startswith("15 of the plain variables do not fit")
    assert str(caught.value).count(";") == 5
    other = {**plain, "params": {**plain["params"], "head": {"bias": jnp.zeros(3)}}}
    with pytest.raises(ValueError, match="left over: params/head/bias"):
        selectivize(other, template_of(network("selective"), SHAPE))
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), plain)
    with pytest.raises(ValueError, match=r"mean is bfloat16\[8\], expected float32\[8\]"):
        selectivize(narrow, template_of(network("selective"), SHAPE))


def test_boxed_parameters_stay_boxed(plain):
    boxed = {**plain, "params": dict(plain["params"])}
    kernel = plain["params"]["stem"]["kernel"]
    boxed["params"]["stem"] = {"kernel": nn.Partitioned(kernel, (None,) * 4)}
    variables = selectivize(boxed, template_of(network("selective"), SHAPE))
    assert variables["params"]["stem"]["kernel"] is boxed["params"]["stem"]["kernel"]


def test_which_is_which(plain):
    selective = perturbed_variables(network("selective"), SHAPE, seed=0)
    with pytest.raises(ValueError, match="the model is selective already"):
        selectivize(selective, selective)
    with pytest.raises(ValueError, match="the template has no selective layer"):
        selectivize(selective, plain)
