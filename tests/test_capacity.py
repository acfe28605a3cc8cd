"""Capacities that fit the copies which the layers have."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import selconv_jax
from selconv_jax import AllocationRule, ConfigError, SelectiveConv, with_capacity
from selconv_jax.analysis import count_multiply_adds
from selconv_jax.compaction import Compact
from selconv_jax.transforms import FittedCapacity
from states import perturbed_variables

X = jax.random.normal(jax.random.key(0), (2, 6, 6, 8))


class Network(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = SelectiveConv(8, (3, 3), name="first")(x, train)
        x = SelectiveConv(6, (1, 1), gate_only=True, name="gated")(x, train)
        return SelectiveConv(4, (3, 3), name="last")(x, train)


class InParts(nn.Module):
    def setup(self):
        self.body = SelectiveConv(8, (3, 3))

    def features(self, x, train):
        return self.body(x, train)

    def __call__(self, x, train):
        return self.features(x, train).mean((1, 2))


@pytest.fixture(scope="module")
def rounds():
    """The variables before and after a round."""
    new = perturbed_variables(Network(), X.shape, seed=0)
    return new, selconv_jax.reallocate(new, jax.random.key(1), AllocationRule(threshold=0.3))[0]


def test_each_layer_gets_its_own(rounds):
    model = with_capacity(Network(), rounds[1])
    copies = {name: state.source for name, state in selconv_jax.layer_states(rounds[1]).items()}
    assert dict(model.capacities) == {
        name: np.ceil(8 * (copies[name] >= 0).mean()) / 8 for name in ("first", "last")
    }
    assert 0 < min(dict(model.capacities).values()) < 1
    for train in (False, True):
        y, changed = model.apply(rounds[1], X, train, mutable=["batch_stats"])
        expected, expected_stats = Network().apply(rounds[1], X, train, mutable=["batch_stats"])
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
        assert jax.tree.structure(changed) == jax.tree.structure(expected_stats)


def test_copies_that_fit_are_no_error_where_nan_is_one(rounds):
    with jax.debug_nans(True):
        for variables in rounds:
            for train in (False, True):
                model = with_capacity(Network(), variables)
                y, _ = model.apply(variables, X, train, mutable=["batch_stats"])
                assert np.isfinite(y).all()


def test_without_copies_it_costs_what_the_plain_network_costs(rounds):
    model = with_capacity(Network(), rounds[0])
    counts, full = (
        sum(count_multiply_adds(lambda x, each=each: each.apply(rounds[0], x, False), X).values())
        for each in (model, Network())
    )
    taps = 6 * 6 * (9 * 8 * 8 + 8 * 6 + 9 * 6 * 4)
    assert counts == 2 * taps < full
    # A round later it does not suffice, which is said and not computed.
    with pytest.raises(ConfigError, match=r"layer 'first': capacity is 0\.0, which provides for 0 copies"):
        model.apply(rounds[1], X, False)
    assert np.isnan(jax.jit(model.apply, static_argnums=2)(rounds[1], X, False)).all()
    renewed = with_capacity(model, rounds[1])
    assert renewed == with_capacity(Network(), rounds[1])
    assert hash(renewed) == hash(with_capacity(Network(), rounds[1]))


def test_flax_captures_each_result_once(rounds):
    class Body(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = SelectiveConv(8, (3, 3), name="first")(x, train)
            x = SelectiveConv(6, (1, 1), gate_only=True, name="gated")(x, train)
            self.sow("intermediates", "own", x)
            return nn.remat(SelectiveConv, static_argnums=(2,))(4, (3, 3), name="last")(x, train)

    def captured(model):
        return model.apply(rounds[1], X, False, capture_intermediates=True)[1]["intermediates"]

    expected = captured(Body())
    assert {len(values) for values in expected["first"].values()} == {1}
    chex.assert_trees_all_close(captured(with_capacity(Body(), rounds[1])), expected, rtol=1e-5, atol=1e-5)


def test_compacted_afterwards(rounds):
    model = with_capacity(Network(), rounds[1])
    closed, _ = selconv_jax.reallocate(rounds[1], jax.random.key(2), AllocationRule(threshold=0.3, top_k=0))
    small, small_variables = selconv_jax.compact(model, closed, X)
    assert small.layouts
    np.testing.assert_allclose(
        small.apply(small_variables, X, train=False),
        Network().apply(closed, X, False),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("name", ["inner", "in/ner"])
def test_inside_of_another_network_under_any_name(rounds, name):
    fitted = with_capacity(Network(), rounds[1])
    small, small_variables = selconv_jax.compact(Network(), rounds[1], X)
    inner = Network(name=name)

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x, is_small):
            if is_small:
                return Compact(inner.clone(parent=self), small.layouts, small.widths)(x, train=False)
            return FittedCapacity(inner.clone(parent=self), fitted.capacities)(x, False)

    for variables, model in ((rounds[1], fitted), (small_variables, small)):
        outer = {collection: {name: tree} for collection, tree in variables.items()}
        is_small = model is small
        y = Outer().apply(outer, X, is_small)
        np.testing.assert_allclose(y, model.apply(variables, X, train=False), rtol=1e-5, atol=1e-6)
        counts, expected = (
            sum(count_multiply_adds(run, X).values())
            for run in (
                lambda x, outer=outer, is_small=is_small: Outer().apply(outer, x, is_small),
                lambda x, model=model, variables=variables: model.apply(variables, x, train=False),
            )
        )
        assert counts == expected


def test_other_methods_of_the_network_run_with_the_capacities():
    plain = InParts()
    variables = perturbed_variables(plain, X.shape, seed=0)
    model = with_capacity(plain, variables)
    counts, full = (
        sum(
            count_multiply_adds(
                lambda x, each=each: each.apply(variables, x, False, method="features"), X
            ).values()
        )
        for each in (model, plain)
    )
    assert counts == 2 * 6 * 6 * 9 * 8 * 8 < full
    y, _ = model.apply(variables, X, True, method="features", mutable=["batch_stats"])
    expected, _ = plain.apply(variables, X, True, method="features", mutable=["batch_stats"])
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    assert model.bind(variables).features(X, False).shape == y.shape
    with pytest.raises(AttributeError, match='"FittedCapacity" object has no attribute "logits"'):
        model.apply(variables, X, False, method="logits")


def test_nnx_layers_get_their_own():
    module = nnx.Sequential(
        selconv_jax.nnx.SelectiveConv(8, 8, (3, 3), rngs=nnx.Rngs(0)),
        selconv_jax.nnx.SelectiveConv(8, 4, (1, 1), gate_only=True, rngs=nnx.Rngs(1)),
    )
    selconv_jax.nnx.fit_capacity(module)
    assert module.layers[0].capacity == 0.0
    report = selconv_jax.nnx.reallocate(module, jax.random.key(0), AllocationRule(threshold=0.4))
    with pytest.raises(ConfigError, match="provides for 0 copies"):
        module(X)
    selconv_jax.nnx.fit_capacity(module)
    assert module.layers[0].capacity == report.copies / 8
    assert jnp.isfinite(module(X)).all()
    with pytest.raises(ConfigError, match=r"steps is 0; it must be a whole number, at least 1"):
        selconv_jax.nnx.fit_capacity(module, steps=0)
