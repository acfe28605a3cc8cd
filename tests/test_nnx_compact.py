"""NNX modules as Linen models, and their compaction."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import selconv_jax
from selconv_jax import AllocationRule, ConfigError
from selconv_jax.analysis import count_layers, count_parameters
from selconv_jax.nnx import (
    LinenModule,
    SelectiveConv,
    compact,
    fit_capacity,
    linen_variables,
    reallocate,
    selectivize_module,
    to_linen,
)

X = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))


class Network(nnx.Module):
    def __init__(self, rngs, dropout=0.1):
        self.stem = nnx.Conv(3, 16, (3, 3), rngs=rngs)
        self.blocks = nnx.List(
            [
                SelectiveConv(16, 16, (3, 3), dropout_rate=dropout, rngs=rngs),
                SelectiveConv(16, 24, (1, 1), strides=2, rngs=rngs),
            ]
        )
        self.norm = nnx.BatchNorm(24, rngs=rngs)
        self.dropout = nnx.Dropout(5 * dropout, rngs=rngs)
        self.head = nnx.Linear(24, 4, rngs=rngs)

    def __call__(self, x, scale=1.0):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = nnx.relu(self.norm(x)).mean(axis=(1, 2))
        return scale * self.head(self.dropout(x))


@pytest.fixture(scope="module")
def module():
    """Moved running statistics, copies, and closed channels in both layers."""
    network = Network(nnx.Rngs(0))
    network(X)
    assert reallocate(network, jax.random.key(0), AllocationRule(threshold=0.3, top_k=1)).copies > 0
    reallocate(network, jax.random.key(1), AllocationRule(threshold=0.2, top_k=0))
    network.eval()
    return network


def test_linen_model_computes_the_same(module):
    model, variables = to_linen(module)
    np.testing.assert_array_equal(model.apply(variables, X, train=False), module(X))
    np.testing.assert_array_equal(model.apply(variables, X, train=False, scale=2.0), module(X, scale=2.0))
    network = Network(nnx.Rngs(0), dropout=0.0)
    model, variables = to_linen(network)
    y, changed = model.apply(variables, X, train=True, mutable=["batch_stats"])
    np.testing.assert_array_equal(network(X), y)
    chex.assert_trees_all_equal(linen_variables(network)["batch_stats"], dict(changed["batch_stats"]))


def test_layers_are_counted_by_their_names(module):
    rows = {row.path: row for row in count_layers(*to_linen(module), X)}
    assert {"stem", "blocks/0", "blocks/1", "norm", "head"} <= set(rows)
    assert rows["stem"].compact.parameters < rows["stem"].plain.parameters
    assert rows["head"].plain.multiply_adds == 4 * 24 * 4


def test_compact_module_computes_the_same_and_trains_on(module):
    small = compact(module, X, rngs=nnx.Rngs(1))
    assert count_parameters(nnx.state(small, nnx.Param)) < count_parameters(nnx.state(module, nnx.Param))
    assert small.network["stem"]["kernel"].shape[-1] < 16  # channels that no layer reads any more
    small.eval()
    np.testing.assert_allclose(small(X), module(X), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(small(X, scale=2.0), module(X, scale=2.0), rtol=1e-5, atol=1e-6)
    before = jax.tree.map(jnp.copy, linen_variables(small)["batch_stats"])
    optimizer = nnx.Optimizer(small, optax.sgd(0.05, momentum=0.9), wrt=nnx.Param)

    @nnx.jit
    def step(small, optimizer):
        def loss(small):
            return optax.softmax_cross_entropy_with_integer_labels(small(X), jnp.arange(4)).mean()

        value, gradients = nnx.value_and_grad(loss)(small)
        optimizer.update(small, gradients)
        return value

    small.train()
    assert (small(X) != small(X)).any()  # dropout
    losses = [float(step(small, optimizer)) for _ in range(8)]
    assert min(losses[-2:]) < losses[0]
    after = linen_variables(small)["batch_stats"]
    assert all(jax.tree.leaves(jax.tree.map(lambda old, new: bool((old != new).any()), before, after)))


def test_training_goes_as_the_whole_module_would():
    whole = Network(nnx.Rngs(0), dropout=0.0)
    reallocate(whole, jax.random.key(0), AllocationRule(threshold=0.3, top_k=0))
    small = compact(whole, jax.ShapeDtypeStruct(X.shape, X.dtype))
    assert isinstance(small, LinenModule)

    def loss(module):
        return jnp.sum(jnp.sin(module(X)))

    expected, gradient = nnx.value_and_grad(loss)(whole)
    actual, of_small = nnx.value_and_grad(loss)(small)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    chex.assert_trees_all_close(of_small["network"]["head"], gradient["head"], rtol=1e-4, atol=1e-5)
    statistics = linen_variables(small)["batch_stats"]["network"]["norm"]
    chex.assert_trees_all_close(
        statistics, linen_variables(whole)["batch_stats"]["norm"], rtol=1e-4, atol=1e-6
    )


def test_layers_that_cannot_be_converted_stay(module):
    class Doubled(SelectiveConv):
        def __call__(self, x, **options):
            return 2 * super().__call__(x, **options)

    class Other(nnx.Module):
        def __init__(self, rngs):
            self.stem = nnx.Conv(3, 16, (3, 3), mask=jnp.ones((3, 3, 3, 16)), rngs=rngs)
            self.conv = Doubled(16, 8, (3, 3), rngs=rngs)

        def __call__(self, x):
            return self.conv(self.stem(x))

    other = Other(nnx.Rngs(0))
    other.eval()
    reallocate(other, jax.random.key(0), AllocationRule(threshold=0.3, top_k=0))
    small = compact(other, X)
    small.eval()
    np.testing.assert_allclose(small(X), other(X), rtol=1e-5, atol=1e-6)


def test_inputs_that_do_not_fit_are_refused(module):
    with pytest.raises(ConfigError, match="pass its inputs"):
        compact(module)
    with pytest.raises(ConfigError, match=r"layer 'stem' takes a kernel of shape \(3, 3, 5, 16\)"):
        compact(module, jnp.ones((1, 8, 8, 5)))


def test_ordinary_module_becomes_selective():
    class Plain(nnx.Module):
        def __init__(self, rngs):
            self.stem = nnx.Conv(3, 16, (3, 3), rngs=rngs)
            self.norms = nnx.List([nnx.BatchNorm(16, momentum=0.9, rngs=rngs) for _ in range(2)])
            self.convs = nnx.List([nnx.Conv(16, 16, (3, 3), use_bias=False, rngs=rngs) for _ in range(2)])
            self.head = nnx.Linear(16, 4, rngs=rngs)

        def __call__(self, x):
            x = self.stem(x)
            for norm, conv in zip(self.norms, self.convs, strict=True):
                x = x + conv(nnx.relu(norm(x)))
            return self.head(x.mean(axis=(1, 2)))

    plain = Plain(nnx.Rngs(0))
    plain(X)
    selective, result = selectivize_module(plain, X)
    assert result.converted == {"convs/0": "norms/0", "convs/1": "norms/1"}
    for mode in ("eval", "train"):
        getattr(plain, mode)()
        getattr(selective, mode)()
        np.testing.assert_allclose(selective(X), plain(X), rtol=1e-4, atol=1e-5)
    report = reallocate(selective, jax.random.key(0), AllocationRule(threshold=0.3))
    assert report.copies > 0
    assert sorted(report.layers) == ["network/convs/0", "network/convs/1"]
    optimizer = nnx.Optimizer(selective, optax.sgd(0.05), wrt=nnx.Param)
    gradient = nnx.grad(lambda module: jnp.sum(module(X) ** 2))(selective)
    optimizer.update(selective, gradient)
    selective.model = selective.model.clone(capacity=0.0)
    with pytest.raises(ConfigError, match="provides for 0 copies"):
        selective(X)


class Noisy(nnx.Module):
    """Network that counts its calls and draws noise in both modes."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 8, (1, 1), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.conv = nnx.Conv(8, 4, (3, 3), use_bias=False, rngs=rngs)
        self.count = nnx.Variable(jnp.zeros((), jnp.int32))
        self.rngs = rngs

    def __call__(self, x):
        self.count[...] += 1
        x = self.stem(x) + 0.5 * jax.random.normal(self.rngs.noise(), (1, 8, 8, 8))
        return self.conv(nnx.relu(self.norm(x)))


@pytest.mark.parametrize("change", ["convert", "compact"])
def test_other_variables_change_as_in_the_module(change):
    plain = Noisy(nnx.Rngs(0, noise=1))
    new = compact(plain, X) if change == "compact" else selectivize_module(plain, X)[0]
    for mode in ("train", "eval"):
        getattr(plain, mode)()
        getattr(new, mode)()
        for _ in range(2):
            y = nnx.jit(lambda module: module(X))(new)
            np.testing.assert_allclose(y, plain(X), atol=1e-3)  # the running variance is unbiased
    assert new.variables()["nnx"]["count"] == plain.count[...] == 4
    means = new.variables()["batch_stats"]["norm" if change == "compact" else "conv"]["mean"]
    np.testing.assert_allclose(means, plain.norm.mean[...], rtol=1e-4, atol=1e-7)


def test_evaluation_writes_nothing_that_is_only_read(module):
    small = compact(module, X)
    small.eval()
    np.testing.assert_allclose(jax.jit(lambda x: small(x))(X), module(X), rtol=1e-5, atol=1e-6)


def converted_module(x):
    rngs = nnx.Rngs(0)
    convs = [nnx.Conv(c, 8, (3, 3), use_bias=False, rngs=rngs) for c in (3, 8)]
    plain = nnx.Sequential(convs[0], nnx.BatchNorm(8, rngs=rngs), nnx.relu, convs[1])
    return selectivize_module(plain, x)[0]


def test_capacity_fits_layers_inside_of_linen_models():
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 3))
    bridge = nnx.bridge.ToNNX(selconv_jax.SelectiveConv(4, (1, 1), train=False), rngs=nnx.Rngs(0))
    converted = converted_module(x)
    own = SelectiveConv(8, 8, (1, 1), rngs=nnx.Rngs(0))
    module = nnx.Sequential(converted, own, bridge.lazy_init(jnp.ones((1, 6, 6, 8))))
    assert reallocate(module, jax.random.key(0), AllocationRule(threshold=0.3)).copies > 2
    expected = module(x)
    for _ in range(2):
        fit_capacity(module)
        copies = [int((state.source >= 0).sum()) for state in selconv_jax.layer_states(module).values()]
        fitted = (converted.model.capacities[0][1], own.capacity, bridge.to_nnx__module.capacities[0][1])
        assert [8 * capacity for capacity in fitted] == copies
    np.testing.assert_allclose(module(x), expected, rtol=1e-5, atol=1e-6)


def test_linen_models_inside_of_a_module_are_compacted():
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 3))
    module = nnx.Sequential(converted_module(x), SelectiveConv(8, 8, (1, 1), rngs=nnx.Rngs(0)))
    module(x)
    report = reallocate(module, jax.random.key(0), AllocationRule(threshold=0.3, top_k=0))
    assert all(layer.deallocated.any() for layer in report.layers.values())
    small = compact(module, x)
    params = small.network["layers"]
    assert params["0"]["network"]["layers"]["0"]["kernel"].shape[-1] < 8
    assert params["1"]["kernel"].shape[2] < 8
    for each in (module, small):
        each.eval()
    np.testing.assert_allclose(small(x), module(x), rtol=1e-4, atol=1e-5)


def test_converted_module_can_be_compacted():
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 3))
    selective = converted_module(x)
    report = reallocate(selective, jax.random.key(0), AllocationRule(threshold=0.3, top_k=0))
    assert report.deallocated > 0
    small = compact(selective, x)
    before, after = (count_parameters(nnx.to_pure_dict(nnx.state(m, nnx.Param))) for m in (selective, small))
    # Of each closed channel: its kernel in the layer before, its own, scale, bias and shift.
    assert before - after >= report.deallocated * (27 + 72 + 2)
    for module in (selective, small):
        module.eval()
    np.testing.assert_allclose(small(x), selective(x), rtol=1e-4, atol=1e-5)
