"""Counts by layer: against numbers worked out by hand, and against the compiler's own."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import selconv_jax
from compactions import NETWORKS
from compiled_products import compiled_multiply_adds
from selconv_jax import SelectiveConv, plan_compaction
from selconv_jax._xla.platforms import tracing_for
from selconv_jax.analysis._counting import count_multiply_adds, count_parameters
from selconv_jax.analysis._layer_counts import Count, count_layers, total_counts
from selconv_jax.errors import ConfigError
from selconv_jax.models import DenseNet, PreResNet, ResNeXt

TINY = DenseNet(10, blocks=(1, 1), growth=2, capacity=0.25)


def image(size, channels=3):
    return jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)


def shapes_of(model, image):
    return jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), image)


def allocated(model, image, gates=lambda gate: gate, sources=lambda source: source):
    """Shapes of the variables, and values of gates and sources."""
    variables = shapes_of(model, image)

    def value(path, leaf):
        if path[-1].key == "gate":
            return gates(np.ones(leaf.shape, bool))
        return sources(np.full(leaf.shape, -1, np.int32))

    return {
        **variables,
        "selectivity": jax.tree_util.tree_map_with_path(value, variables.get("selectivity", {})),
    }


def some_closed(gate):
    return np.arange(gate.size) % 4 != 1


def some_copied(source):
    return np.where(np.arange(source.size) % 8 == 2, 1, source)


def tiny():
    """Six stages, of which three have closed channels and one has a copy."""
    variables = allocated(TINY, image(8))
    first, second = (variables["selectivity"][f"block{block}_layer1"] for block in (1, 2))
    first["conv1"]["source"][1] = 0
    first["conv2"]["gate"][4:] = False
    second["conv1"]["gate"][3] = False
    return variables


def test_by_hand():
    layers = {layer.path: layer for layer in count_layers(TINY, tiny(), image(8))}
    assert {path: layer.plain for path, layer in layers.items()} == {
        "stem": Count(27 * 4, 64 * 27 * 4),
        "block1_layer1/conv1": Count(4 * 8 + 2 * 4, 64 * 4 * 8),
        "block1_layer1/conv2": Count(72 * 2 + 2 * 8, 64 * 72 * 2),
        "block2_layer1/conv1": Count(6 * 8 + 2 * 6, 16 * 6 * 8),
        "block2_layer1/conv2": Count(72 * 2 + 2 * 8, 16 * 72 * 2),
        "classifier/norm": Count(2 * 8, 0),
        "classifier/linear": Count(8 * 10 + 10, 8 * 10),
    }
    # A shift has two numbers. One slot for copies among 4 channels, two among 6: interpolated along both
    # axes.
    shifts = {"block1_layer1/conv1": 2 * 4, "block2_layer1/conv1": 2 * 6}
    copies = {
        "block1_layer1/conv1": 64 * (8 + 8),
        "block2_layer1/conv1": 2 * 16 * (4 + 4),
    }
    for path, layer in layers.items():
        assert layer.selective == layer.plain + Count(shifts.get(path, 0), copies.get(path, 0)), path
    # The 3x3 convolution of block 1 reads 4 of its 8 channels, which are all that the 1x1 one makes.
    assert {path: layer.compact for path, layer in layers.items()} == {
        "stem": layers["stem"].plain,
        "block1_layer1/conv1": Count(4 * 4 + 2 * 4 + 2, 64 * 4 * 4 + copies["block1_layer1/conv1"]),
        "block1_layer1/conv2": Count(36 * 2 + 2 * 4, 64 * 36 * 2),
        "block2_layer1/conv1": Count(5 * 8 + 2 * 5, 16 * 5 * 8),
        "block2_layer1/conv2": layers["block2_layer1/conv2"].plain,
        "classifier/norm": layers["classifier/norm"].plain,
        "classifier/linear": layers["classifier/linear"].plain,
    }
    assert list(layers)[:3] == ["stem", "block1_layer1/conv1", "block1_layer1/conv2"]


def test_with_nothing_allocated_all_forms_cost_the_same_but_for_slots():
    variables = allocated(TINY, image(8))
    capacity = total_counts(count_layers(TINY, variables, image(8)))
    none = total_counts(count_layers(TINY.clone(capacity=0.0), variables, image(8)))
    assert none.plain.multiply_adds == none.selective.multiply_adds == none.compact.multiply_adds
    assert capacity.selective.multiply_adds > none.selective.multiply_adds
    assert (capacity.plain, capacity.compact) == (none.plain, none.compact)


@pytest.mark.parametrize("name", NETWORKS)
def test_totals(name):
    """The sums over the layers are the counts of the three networks as a whole."""
    model = NETWORKS[name].clone(capacity=0.5)
    variables = allocated(model, image(8), some_closed, some_copied)
    total = total_counts(count_layers(model, variables, image(8)))
    plain = model.clone(variant="plain")
    plan = plan_compaction(model, variables, image(8), compare=False)
    shapes = shapes_of(model, image(8))
    expected = [
        (total.plain, plain, shapes_of(plain, image(8))),
        (total.selective, model, shapes),
        (total.compact, plan.model, jax.eval_shape(plan.take, shapes)),
    ]
    for counted, network, variables in expected:
        products = count_multiply_adds(network_function(network), variables, image(8))
        assert counted == Count(count_parameters(variables["params"]), sum(products.values()))


def network_function(network):
    return lambda variables, images: network.apply(variables, images, train=False)


@pytest.mark.parametrize(
    "model",
    [
        DenseNet(10, blocks=(2, 1), growth=8, compression=0.5, capacity=0.25),
        PreResNet(10, blocks=(1, 1), width=8, capacity=0.25),
        ResNeXt(10, blocks=(1, 1), groups=2, base_width=16, widen=1, capacity=0.25),
    ],
    ids=lambda model: type(model).__name__,
)
def test_the_compiler_counts_the_same(model):
    """Of the products, within 2%: measured on CPU, it is the same number.

    Compared are the products alone, without the elementwise operations that the compiler counts too, and with
    the taps on padding made visible to it, which it leaves out otherwise (see `compiled_products`).
    """
    variables = allocated(model, image(16), some_closed, some_copied)
    total = total_counts(count_layers(model, variables, image(16)))
    plan = plan_compaction(model, variables, image(16), compare=False)
    shapes = shapes_of(model, image(16))
    small = jax.eval_shape(plan.take, shapes)
    networks = (model.clone(capacity=0.0), shapes), (model, shapes), (plan.model, small)
    for counts, (network, variables) in zip(
        (total.plain, total.selective, total.compact), networks, strict=True
    ):
        compiled = compiled_multiply_adds(network_function(network), variables, image(16))
        assert counts.multiply_adds == pytest.approx(compiled, rel=0.02)
    assert total.compact.multiply_adds < total.plain.multiply_adds < total.selective.multiply_adds


def test_the_compiler_leaves_out_taps_on_padding():
    """3x3 taps on 16x16 pixels: 46 of 48 meet the image along each axis."""
    model, pixels = SelectiveConv(8, (3, 3), gate_only=True), image(16, 4)
    shapes, function = shapes_of(model, pixels), network_function(model)
    taps = 16 * 16 * 9 * 4 * 8
    assert compiled_multiply_adds(function, shapes, pixels) == pytest.approx(taps, rel=0.02)
    valid = compiled_multiply_adds(function, shapes, pixels, padded=False)
    assert valid == pytest.approx(taps * (46 / 48) ** 2, rel=0.02)


def test_a_single_layer_in_one_dimension():
    layer = SelectiveConv(features=6, kernel_size=5, capacity=0.5)
    signal = jax.ShapeDtypeStruct((2, 10, 4), jnp.float32)
    variables = allocated(layer, signal, sources=lambda source: np.array([-1, 0, -1, -1], np.int32))
    (counts,) = count_layers(layer, variables, signal)
    plain = 2 * 10 * 5 * 4 * 6
    assert counts.path == ""
    assert counts.plain == Count(5 * 4 * 6 + 2 * 4, plain)
    # Two slots: for each 10 x 10 weights.
    slot = 2 * 10 * 10
    assert counts.selective == Count(5 * 4 * 6 + 3 * 4, plain + 2 * slot)
    assert counts.compact == Count(5 * 4 * 6 + 2 * 4 + 1, plain + 2 * 10 * 10)
    with tracing_for("tpu"):
        (counts,) = count_layers(layer, variables, signal)
    # There 10 pixels are read from 4 channels and put into 4, as products.
    assert counts.selective.multiply_adds == plain + 2 * (slot + 2 * (2 * 10 * 4))
    assert counts.compact.multiply_adds == plain + 2 * 10 * 10 + 2 * (2 * 10 * 4)


class Looped(nn.Module):
    """Three stacked layers, recomputed in the backward pass, whose capacity is set in the model's code."""

    @nn.compact
    def __call__(self, x, train):
        stack = nn.scan(
            nn.remat(Step, static_argnums=(2,)),
            variable_axes={"params": 0, "batch_stats": 0, "selectivity": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=3,
        )
        return nn.Dense(2, name="head")(stack(name="stack")(x, train)[0])


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return SelectiveConv(4, (1, 1), capacity=0.5, name="conv")(x, train), None


def test_stacked_layers_of_another_network():
    variables = allocated(Looped(), image(6, 4), lambda gate: gate)
    variables["selectivity"]["stack"]["conv"]["source"][1, 0] = 3
    stack, head = count_layers(Looped(), variables, image(6, 4))
    assert (stack.path, head.path) == ("stack/conv", "head")
    assert stack.plain == Count(3 * (4 * 4 + 2 * 4), 3 * 36 * 4 * 4)
    slot = 36 * (6 + 6)
    assert stack.selective == stack.plain + Count(3 * 2 * 4, 3 * 2 * slot)
    assert stack.compact == stack.selective, "stacked layers stay as they are"
    assert head.plain == head.compact == Count(4 * 2 + 2, 36 * 4 * 2)


def test_a_plain_network_is_the_same_in_all_forms():
    model = TINY.clone(variant="plain")
    for layer in count_layers(model, shapes_of(model, image(8)), image(8)):
        assert layer.plain == layer.selective == layer.compact


def test_too_few_slots():
    variables = tiny()
    with pytest.raises(ConfigError, match=r"block1_layer1/conv1.*capacity is 0.0.*but 1 of its 4 .*copies"):
        count_layers(TINY.clone(capacity=0.0), variables, image(8))
    needed = TINY.clone(capacity=selconv_jax.required_capacity(_filled(variables)))
    assert count_layers(needed, variables, image(8))


def test_gates_without_values():
    with pytest.raises(ValueError, match="gates and sources are shapes"):
        count_layers(TINY, shapes_of(TINY, image(8)), image(8))


def _filled(variables):
    return jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf,
        variables,
    )
