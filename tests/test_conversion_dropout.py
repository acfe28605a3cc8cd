"""Dropout of converted networks: where it is, how often, and in which mode, as in the plain ones."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import selconv_jax
from selconv_jax import selectivize_model
from states import perturbed_variables

X = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))


def trained(model):
    return perturbed_variables(model, X.shape, seed=0)


def test_dropout_that_is_called_in_training_only():
    class Sometimes(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.relu(nn.BatchNorm(not train)(nn.Conv(12, (1, 1), name="stem")(x)))
            if train:
                x = nn.Dropout(0.5, deterministic=False)(x)
            return nn.Conv(6, (3, 3), use_bias=False)(x)

    model = Sometimes()
    variables = trained(model)
    selective, new, *_ = selectivize_model(model, variables, X)
    expected = model.apply(variables, X, train=False)
    np.testing.assert_allclose(selective.apply(new, X, train=False), expected, rtol=1e-4, atol=1e-5)
    apply = partial(selective.apply, new, X, train=True, mutable=["batch_stats"])
    first, second = (apply(rngs={"dropout": jax.random.key(key)})[0] for key in range(2))
    assert (first != second).any()


class Shared(nn.Module):
    """One dropout before two convolutions and elsewhere, in an order in which no call is next to its own."""

    @nn.compact
    def __call__(self, x, train):
        dropout = nn.Dropout(0.5, deterministic=not train)
        x = nn.Conv(12, (1, 1), name="stem")(x)
        one = nn.relu(nn.BatchNorm(not train)(x))
        two = nn.relu(nn.BatchNorm(not train)(-x))
        two = dropout(two)
        stem = dropout(x)
        one = dropout(one)
        one, two = (nn.Conv(64, (3, 3), use_bias=False)(y) for y in (one, two))
        return {"one": one, "two": two, "stem": stem, "head": dropout(jnp.ones_like(one))}


def test_a_dropout_is_called_as_often_as_in_the_plain_network():
    model = Shared()
    variables = trained(model)
    result = selectivize_model(model, variables, X)
    assert result.converted == {"Conv_0": "BatchNorm_0", "Conv_1": "BatchNorm_1"}
    expected = model.apply(variables, X, train=False)
    y = result.model.apply(result.variables, X, train=False)
    for key, value in expected.items():
        np.testing.assert_allclose(y[key], value, rtol=1e-4, atol=1e-5)

    def outputs(model, variables):
        apply = partial(model.apply, variables, X, train=True, mutable=["batch_stats"])
        return [apply(rngs={"dropout": jax.random.key(key)})[0] for key in range(2)]

    for first, second in (outputs(model, variables), outputs(result.model, result.variables)):
        assert 0.4 < (first["head"] == 0).mean() < 0.6
        assert 0.4 < (first["stem"] == 0).mean() < 0.6
        for key in ("one", "two"):
            assert (first[key] != second[key]).any()


@pytest.mark.parametrize("is_compact", [False, True], ids=["whole", "compact"])
def test_dropout_has_its_own_mode(is_compact):
    class Separate(nn.Module):
        @nn.compact
        def __call__(self, x, train, deterministic=True):
            x = nn.relu(nn.BatchNorm(not train)(nn.Conv(12, (1, 1), name="stem")(x)))
            x = nn.Conv(6, (3, 3), use_bias=False)(nn.Dropout(0.5)(x, deterministic=deterministic))
            return x.mean((1, 2))

    model = Separate()
    variables = trained(model)
    result = selectivize_model(model, variables, X, deterministic=False)
    assert result.converted == {"Conv_0": "BatchNorm_0"}
    selective, new = result.model, result.variables
    if is_compact:
        new["selectivity"]["Conv_0"]["gate"] = jnp.arange(12) < 8
        kernel = variables["params"]["Conv_0"]["kernel"].at[:, :, 8:].set(0.0)
        variables["params"]["Conv_0"]["kernel"] = kernel
        selective, new = selconv_jax.compact(selective, new, X, deterministic=False)
        assert new["params"]["Conv_0"]["kernel"].shape == (3, 3, 8, 6)

    def outputs(model, variables, **modes):
        apply = partial(model.apply, variables, X, mutable=["batch_stats"], **modes)
        return [apply(rngs={"dropout": jax.random.key(key)})[0] for key in range(2)]

    for train in (True, False):
        first, second = outputs(selective, new, train=train, deterministic=False)
        assert (first != second).any()
        first, _ = outputs(selective, new, train=train, deterministic=True)
        expected, _ = outputs(model, variables, train=train, deterministic=True)
        np.testing.assert_allclose(first, expected, rtol=1e-4, atol=1e-5)
