"""Selective layers inside of Flax NNX modules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import meta

import selconv_jax
from selconv_jax import AllocationRule, SelectiveConv
from selconv_jax.nnx._bridge import linen_variables, update_module


class Network(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.blocks = nnx.List(
            [
                nnx.bridge.ToNNX(SelectiveConv(16, (3, 3)), rngs=rngs),
                nnx.bridge.ToNNX(SelectiveConv(16, (1, 1), gate_only=True), rngs=rngs),
            ]
        )
        self.head = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x, train):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x, train, mutable=["batch_stats"] if train else False)
        return self.head(x.mean(axis=(1, 2)))


X = jax.random.normal(jax.random.key(0), (4, 6, 6, 1))
LABELS = jnp.arange(4)


@pytest.fixture
def module():
    network = Network(nnx.Rngs(0))
    nnx.bridge.lazy_init(network, X, train=False)
    return network


@nnx.jit
def train_step(network, optimizer):
    def loss(network):
        return optax.softmax_cross_entropy_with_integer_labels(network(X, train=True), LABELS).mean()

    value, gradients = nnx.value_and_grad(loss)(network)
    optimizer.update(network, gradients)
    return value


def test_variables_are_those_of_the_linen_layers(module):
    variables = linen_variables(module)
    assert sorted(variables) == ["batch_stats", "params", "selectivity"]
    assert sorted(variables["params"]) == ["blocks", "head", "stem"]
    assert list(selconv_jax.layer_states(variables)) == ["blocks/0", "blocks/1"]
    assert variables["selectivity"]["blocks"]["0"]["source"].dtype == jnp.int32
    # The layer alone, with these variables, computes what it computes inside of the module.
    one = {name: leaves["blocks"]["0"] for name, leaves in variables.items()}
    x = jax.random.normal(jax.random.key(1), (2, 6, 6, 16))
    expected = SelectiveConv(16, (3, 3)).apply(meta.unbox(one), x, train=False)
    np.testing.assert_allclose(module.blocks[0](x, False), expected, rtol=1e-6, atol=1e-6)


def test_trains_and_reallocates(module):
    optimizer = nnx.Optimizer(module, optax.sgd(0.05, momentum=0.9), wrt=nnx.Param)
    losses = [float(train_step(module, optimizer)) for _ in range(3)]
    assert module.blocks[0].mean[...].any()  # running statistics move
    closed, _ = selconv_jax.reallocate(
        linen_variables(module), jax.random.key(1), AllocationRule(threshold=0.2, top_k=0)
    )
    variables, report = selconv_jax.reallocate(
        linen_variables(module), jax.random.key(1), AllocationRule(threshold=0.2)
    )
    assert report.deallocated > report.reallocated > 0
    stem = module.stem.kernel[...]
    update_module(module, closed)
    before = module(X, train=False)
    update_module(module, variables)
    np.testing.assert_allclose(module(X, train=False), before, rtol=1e-5, atol=1e-5)
    assert (module.blocks[0].source[...] >= 0).sum() == report.reallocated
    assert (~module.blocks[1].gate[...]).sum() == report.deallocated - report.reallocated
    np.testing.assert_array_equal(module.stem.kernel[...], stem)
    shift = module.blocks[0].shift[...]
    losses += [float(train_step(module, optimizer)) for _ in range(4)]
    assert losses[-1] < losses[0]
    moved = (module.blocks[0].shift[...] != shift).any(axis=1)
    np.testing.assert_array_equal(moved, report.layers["blocks/0"].reallocated)
    assert (module.blocks[0].source[...] >= 0).sum() == report.reallocated  # training leaves it alone


def test_optimizer_state_on_an_nnx_state(module):
    variables, report = selconv_jax.reallocate(
        linen_variables(module), jax.random.key(1), AllocationRule(threshold=0.2)
    )
    update_module(module, variables)
    params = nnx.state(module, nnx.Param)
    optimizer = optax.sgd(0.1, momentum=0.9)
    ones = jax.tree.map(jnp.ones_like, optimizer.init(params))
    reset = selconv_jax.reset_rewritten(optimizer, ones, params, report)
    scale = reset[0].trace["blocks"][0]["scale"][...]
    np.testing.assert_array_equal(scale == 0, report.layers["blocks/0"].reallocated)


def test_variables_of_another_module_are_refused(module):
    variables = linen_variables(module)
    del variables["params"]["head"]
    with pytest.raises(ValueError, match="only the module has 'params/head/bias'"):
        update_module(module, variables)
    strange = linen_variables(module)
    strange["params"]["tail"] = {"bias": jnp.zeros(3)}
    with pytest.raises(ValueError, match="only the dictionary has 'params/tail/bias'"):
        update_module(module, strange)


def test_arrays_of_another_shape_are_refused_by_name(module):
    variables = linen_variables(module)
    variables["params"]["blocks"]["0"]["scale"] = jnp.ones(3)
    with pytest.raises(ValueError, match=r"params/blocks/0/scale is float32\[16\] .* float32\[3\]"):
        update_module(module, variables)
