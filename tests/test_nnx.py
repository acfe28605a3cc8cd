"""Selective layers as Flax NNX modules: recorded numbers, transformations, rounds, optimizers, the bridge."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import meta
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import selconv_jax
from recorded import ALLOCATION_CASES, LAYER_CASES, assert_close, read
from selconv_jax import AllocationRule, ConfigError
from selconv_jax.nnx import (
    BatchNormReLUConv,
    SelectiveConv,
    Selectivity,
    linen_variables,
    reallocate,
    reset_rewritten,
    selectivize,
    update_module,
)

PARAMS = ("kernel", "scale", "bias", "shift")
STATISTICS = ("mean", "var")


class Network(nnx.Module):
    def __init__(self, rngs, conv=SelectiveConv, **options):
        self.stem = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.blocks = nnx.List([conv(16, 16, (3, 3), rngs=rngs), conv(16, 16, (1, 1), rngs=rngs, **options)])
        self.head = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean(axis=(1, 2)))


X = jax.random.normal(jax.random.key(0), (4, 6, 6, 1))
LABELS = jnp.arange(4)
RULE = AllocationRule(threshold=0.2)


@pytest.fixture
def module():
    return Network(nnx.Rngs(0), gate_only=True)


def loss_of(network):
    return optax.softmax_cross_entropy_with_integer_labels(network(X), LABELS).mean()


@nnx.jit
def train_step(network, optimizer):
    value, gradients = nnx.value_and_grad(loss_of)(network)
    optimizer.update(network, gradients)
    return value


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", LAYER_CASES)
def test_recorded_layer(name, dtype):
    case = read(name)
    gate_only = "gate_only" in name
    with jax.enable_x64(dtype == np.float64):
        layer = SelectiveConv(
            case["kernel"].shape[2],
            case["kernel"].shape[3],
            case["kernel"].shape[:2],
            strides=tuple(case["strides"].tolist()),
            padding=tuple(case["padding"].tolist()),
            use_running_average=not name.endswith("_train"),
            param_dtype=dtype,
            gate_only=gate_only,
            rngs=nnx.Rngs(0),
        )
        fill(layer, case, dtype, ("gate",) if gate_only else ("gate", "source"))

        @nnx.jit
        @nnx.grad(argnums=(0, 1), has_aux=True)
        def gradients(layer, x):
            y = layer(x)
            return jnp.sum(y * jnp.asarray(case["cotangent"], dtype)), y

        (of_layer, of_x), y = gradients(layer, jnp.asarray(case["x"], dtype))
    assert_close(y, case["y"], dtype, "y")
    assert_close(of_x, case["grad_x"], dtype, "grad_x")
    for key in PARAMS[: 3 if gate_only else 4]:
        assert_close(of_layer[key][...], case[f"grad_{key}"], dtype, f"grad_{key}")
    for key in STATISTICS:
        assert_close(getattr(layer, key)[...], case[f"new_{key}"], dtype, f"new_{key}")


@pytest.mark.parametrize("name", [name for name in ALLOCATION_CASES if "out_gate" in read(name)])
def test_recorded_round(name):
    case = {key.removeprefix("in_"): value for key, value in read(name).items()}
    limit = int(case["max_copies"])

    def after(key, top_k):
        layer = SelectiveConv(
            *case["kernel"].shape[2:], case["kernel"].shape[:2], param_dtype=np.float64, rngs=nnx.Rngs(0)
        )
        fill(layer, case, np.float64, ("gate", "source"))
        rule = AllocationRule(
            threshold=float(case["threshold"]), top_k=top_k, max_copies=None if limit < 0 else limit
        )
        reallocate(layer, jax.random.key(key), rule)
        return layer

    with jax.enable_x64(True):
        closed = after(0, 0)
        np.testing.assert_array_equal(closed.gate[...], case["dealloc_gate"])
        np.testing.assert_array_equal(closed.source[...], case["dealloc_source"])
        seen = set()
        for key in range(20):
            filled = after(key, int(case["top_k"]))
            slots = np.flatnonzero(filled.gate[...] & ~case["dealloc_gate"])
            np.testing.assert_array_equal(slots, case["slots"])
            seen |= set(filled.source[...][slots].tolist())
    # A copy of a copy reads what that one reads.
    source = case["dealloc_source"]
    read_by = {int(source[channel] if source[channel] >= 0 else channel) for channel in case["candidates"]}
    assert seen == (read_by if len(case["slots"]) else set())


def fill(layer, case, dtype, allocation):
    for key in PARAMS + STATISTICS:
        if hasattr(layer, key):
            getattr(layer, key)[...] = jnp.asarray(case[key], dtype)
    for key in allocation:
        getattr(layer, key)[...] = jnp.asarray(case[key])


@pytest.mark.parametrize("kind", ["plain", "selective"])
def test_equals_the_linen_layer(kind):
    options = {"strides": 2, "padding": "VALID", "feature_group_count": 2, "momentum": 0.5, "epsilon": 1e-3}
    x = jax.random.normal(jax.random.key(1), (2, 9, 9, 8)) + 1
    if kind == "plain":
        layer = BatchNormReLUConv(8, 4, (3, 3), **options, rngs=nnx.Rngs(0))
        linen = selconv_jax.BatchNormReLUConv(4, (3, 3), **options)
    else:
        layer = SelectiveConv(8, 4, (3, 3), **options, capacity=0.75, rngs=nnx.Rngs(0))
        linen = selconv_jax.SelectiveConv(4, (3, 3), **options, capacity=0.75)
        assert reallocate(layer, jax.random.key(0), AllocationRule(threshold=0.3)).copies > 0
    variables = linen_variables(layer)
    chex.assert_trees_all_equal_shapes_and_dtypes(variables, linen.init(jax.random.key(0), x, train=False))
    chex.assert_trees_all_equal(layer(x, True), linen.apply(variables, x, False))
    y, changed = linen.apply(variables, x, True, mutable=["batch_stats"])
    chex.assert_trees_all_equal(layer(x), y)
    chex.assert_trees_all_equal(linen_variables(layer)["batch_stats"], changed["batch_stats"])


def test_modes_and_dropout():
    layer = SelectiveConv(8, 4, (3, 3), dropout_rate=0.5, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 6, 6, 8))
    layer.eval()
    mean = layer.mean[...]
    np.testing.assert_array_equal(layer(x), layer(x))
    np.testing.assert_array_equal(layer.mean[...], mean)
    layer.train()
    assert (layer(x) != layer(x)).any()
    assert (layer.mean[...] != mean).all()
    np.testing.assert_array_equal(layer(x, use_running_average=True), layer(x, True))
    np.testing.assert_array_equal(layer(x, deterministic=True), layer(x, deterministic=True))
    assert (layer(x, True, deterministic=False) != layer(x, True, deterministic=False)).any()


def test_trains_and_reallocates(module):
    optimizer = nnx.Optimizer(module, optax.sgd(0.05, momentum=0.9), wrt=nnx.Param)
    losses = [float(train_step(module, optimizer)) for _ in range(3)]
    assert module.blocks[0].mean[...].any()  # running statistics move
    module.eval()
    stem, closed = module.stem.kernel[...], nnx.clone(module)
    reallocate(closed, jax.random.key(1), AllocationRule(threshold=0.2, top_k=0))
    report = reallocate(module, jax.random.key(1), RULE)
    assert list(report.layers) == ["blocks/0", "blocks/1"]
    assert report.deallocated > report.reallocated > 0
    np.testing.assert_allclose(module(X), closed(X), rtol=1e-5, atol=1e-5)
    assert (module.blocks[0].source[...] >= 0).sum() == report.reallocated
    assert (~module.blocks[1].gate[...]).sum() == report.deallocated - report.reallocated
    np.testing.assert_array_equal(module.stem.kernel[...], stem)
    module.train()
    shift = module.blocks[0].shift[...]
    losses += [float(train_step(module, optimizer)) for _ in range(4)]
    assert losses[-1] < losses[0]
    moved = (module.blocks[0].shift[...] != shift).any(axis=1)
    np.testing.assert_array_equal(moved, report.layers["blocks/0"].reallocated)
    assert (module.blocks[0].source[...] >= 0).sum() == report.reallocated  # training leaves it alone


def test_a_layer_without_a_rule_stays_as_it_is(module):
    before = nnx.clone(module)
    report = reallocate(module, jax.random.key(1), {"blocks/0": RULE}.get)
    assert list(report.layers) == ["blocks/0"]
    assert (module.blocks[0].source[...] >= 0).sum() == report.reallocated > 0
    chex.assert_trees_all_equal(nnx.state(module.blocks[1]), nnx.state(before.blocks[1]))


def test_round_under_jit_is_that_outside(module):
    other = nnx.clone(module)
    report = nnx.jit(reallocate, static_argnums=2)(other, jax.random.key(1), RULE)
    chex.assert_trees_all_equal(report, selconv_jax.reallocate(module, jax.random.key(1), RULE))
    chex.assert_trees_all_equal(nnx.state(other), nnx.state(module))


def test_functions_of_variables_take_the_module(module):
    report = selconv_jax.reallocate(module, jax.random.key(1), RULE)
    states = selconv_jax.layer_states(module)
    assert int((states["blocks/0"].source >= 0).sum()) == report.copies
    assert selconv_jax.required_capacity(module) == report.copies / 16
    module.blocks[0].capacity = selconv_jax.required_capacity(module)
    module(X)
    module.blocks[0].capacity = 0.0
    with pytest.raises(ConfigError, match=f"provides for 0 copies, but {report.copies} of its 16"):
        module(X)


def test_optimizer_state_of_rewritten_entries(module):
    optimizer = nnx.Optimizer(module, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)
    train_step(module, optimizer)
    report = reallocate(module, jax.random.key(1), RULE)
    before = nnx.as_pure(optimizer.opt_state)[0].trace
    reset_rewritten(optimizer, module, report)
    after = nnx.as_pure(optimizer.opt_state)[0].trace
    old, new = (trace["blocks"][0]["scale"] for trace in (before, after))
    assert (old != 0).all()
    np.testing.assert_array_equal(new, jnp.where(report.layers["blocks/0"].reallocated, 0, old))
    chex.assert_trees_all_equal(after["head"], before["head"])
    train_step(module, optimizer)


def test_trained_plain_module_becomes_selective():
    plain, selective = Network(nnx.Rngs(0), BatchNormReLUConv), Network(nnx.Rngs(1))
    train_step(plain, nnx.Optimizer(plain, optax.sgd(0.1), wrt=nnx.Param))
    selectivize(plain, selective)
    plain.eval()
    selective.eval()
    np.testing.assert_array_equal(selective(X), plain(X))
    with pytest.raises(ValueError, match="the model is selective already"):
        selectivize(selective, selective)


def test_vmap_over_modules_and_scan_over_layers():
    rngs = nnx.Rngs(0)

    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def stack(rngs):
        return SelectiveConv(8, 8, (3, 3), rngs=rngs)

    layers = stack(rngs)
    assert layers.kernel.shape == (3, 3, 3, 8, 8)
    x = jax.random.normal(jax.random.key(1), (2, 6, 6, 8))
    report = reallocate(layers, jax.random.key(0), AllocationRule(threshold=0.3))
    assert report.layers[""].open.shape == (3,)

    alone = [nnx.clone(layers) for _ in range(3)]
    for index, layer in enumerate(alone):
        nnx.update(layer, jax.tree.map(lambda leaf, index=index: leaf[index], nnx.state(layers)))
    expected = x
    for layer in alone:
        expected = expected + layer(expected)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def run(x, layer):
        return x + layer(x)

    np.testing.assert_allclose(run(x, layers), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(layers.mean[2], alone[2].mean[...], rtol=1e-5, atol=1e-6)


def test_split_merge_and_sharding_annotations():
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
    init = nnx.with_partitioning(nnx.initializers.normal(), (None, None, None, "model"))
    with jax.set_mesh(mesh):
        layer = SelectiveConv(8, 4, (3, 3), kernel_init=init, rngs=nnx.Rngs(0))
        sharding = NamedSharding(mesh, PartitionSpec(None, None, None, "model"))
        assert layer.kernel[...].sharding.is_equivalent_to(sharding, 4)
        report = reallocate(layer, jax.random.key(0), AllocationRule(threshold=0.3))
        assert report.copies > 0
        assert layer.kernel[...].sharding.is_equivalent_to(sharding, 4)
    graph, params, statistics, allocation = nnx.split(layer, nnx.Param, nnx.BatchStat, Selectivity)
    assert sorted(allocation) == ["gate", "source"]
    other = nnx.merge(graph, params, statistics, allocation)
    x = jax.random.normal(jax.random.key(1), (2, 6, 6, 8))
    np.testing.assert_array_equal(other(x), layer(x))


def test_both_layers_take_the_same_arguments():
    plain, selective = (
        inspect.signature(layer.__init__).parameters for layer in (BatchNormReLUConv, SelectiveConv)
    )
    assert {name: selective[name] for name in plain} == dict(plain)
    assert selective.keys() - plain.keys() == {"capacity", "gate_only"}


def test_bad_arguments_are_named():
    make = {"rngs": nnx.Rngs(0)}
    with pytest.raises(ConfigError, match="in_features is 9, not a multiple of feature_group_count 2"):
        SelectiveConv(9, 4, (3, 3), feature_group_count=2, **make)
    with pytest.raises(ConfigError, match="momentum is 2"):
        BatchNormReLUConv(8, 4, (3, 3), momentum=2, **make)
    with pytest.raises(ConfigError, match=r"capacity is 1\.5"):
        SelectiveConv(8, 4, (3, 3), capacity=1.5, **make)
    layer = SelectiveConv(8, 4, (3, 3), **make)
    with pytest.raises(ValueError, match=r"input of shape \(2, 6, 6, 7\), but in_features is 8"):
        layer(jnp.ones((2, 6, 6, 7)))
    with pytest.raises(ValueError, match="needs 4 dimensions"):
        layer(jnp.ones((6, 6, 8)))


def test_variables_of_another_module_are_refused(module):
    variables = linen_variables(module)
    del variables["params"]["head"]
    with pytest.raises(ConfigError, match="module is a dict; it must be a Flax NNX module"):
        linen_variables({})
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


def test_linen_layers_in_the_bridge():
    class Bridged(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.bridge.ToNNX(selconv_jax.SelectiveConv(16, (3, 3)), rngs=rngs)

        def __call__(self, x, train):
            return self.conv(x, train, mutable=["batch_stats"] if train else False)

    module, x = Bridged(nnx.Rngs(0)), jax.random.normal(jax.random.key(1), (2, 6, 6, 8))
    nnx.bridge.lazy_init(module, x, train=False)
    report = reallocate(module, jax.random.key(1), AllocationRule(threshold=0.5))
    assert (module.conv.source[...] >= 0).sum() == report.reallocated > 0
    one = {name: leaves["conv"] for name, leaves in linen_variables(module).items()}
    expected = selconv_jax.SelectiveConv(16, (3, 3)).apply(meta.unbox(one), x, train=False)
    np.testing.assert_allclose(module(x, train=False), expected, rtol=1e-6, atol=1e-6)
