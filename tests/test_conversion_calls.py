"""Calls of converted networks that read what is inside of a layer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from selconv_jax import SelectiveConv, selectivize_model

X = jax.random.normal(jax.random.key(0), (2, 6, 6, 3))


class Network(nn.Module):
    @nn.compact
    def __call__(self, x, train, with_features=False):
        x = nn.Conv(8, (1, 1), name="stem")(x)
        features = nn.relu(nn.BatchNorm(not train)(x))
        y = nn.Conv(4, (3, 3), use_bias=False)(features)
        return (y, features) if with_features else y


def converted():
    model = Network()
    variables = model.init(jax.random.key(1), X, train=False)
    variables["params"]["BatchNorm_0"]["bias"] += 0.3
    result = selectivize_model(model, variables, X)
    assert result.converted == {"Conv_0": "BatchNorm_0"}
    return model.apply(variables, X, train=False), result


def test_an_activation_that_is_not_computed_is_not_a_number():
    expected, result = converted()
    y, features = result.model.apply(result.variables, X, train=False, with_features=True)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    assert jnp.isnan(features).all()
    y, captured = result.model.apply(result.variables, X, train=False, capture_intermediates=True)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    assert jnp.isnan(captured["intermediates"]["BatchNorm_0"]["__call__"][0]).all()
    assert all(len(result) == 1 for result in jax.tree.leaves(captured, is_leaf=lambda x: type(x) is tuple))
    for kind in (nn.Conv, SelectiveConv):  # the layer's place and the layer itself
        _, captured = result.model.apply(
            result.variables,
            X,
            train=False,
            capture_intermediates=lambda module, _, kind=kind: type(module) is kind,
        )
        assert len(captured["intermediates"]["Conv_0"]["__call__"]) == 1


def test_training_has_no_trace_of_it():
    expected, result = converted()

    def loss(params):
        y, _ = result.model.apply(
            {**result.variables, "params": params}, X, train=True, mutable=["batch_stats"]
        )
        return jnp.mean(y**2)

    gradient = jax.grad(loss)(result.variables["params"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    with jax.debug_nans(True):
        y = result.model.apply(result.variables, X, train=False)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
