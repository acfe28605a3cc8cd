"""What compaction removes, worked out by hand on small networks."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import selconv_jax
from compactions import NETWORKS, SHAPE, assert_same_function, close, copy, images
from selconv_jax import ConfigError, SelectiveConv
from selconv_jax.analysis._counting import count_parameters
from selconv_jax.compaction import LayerLayout
from selconv_jax.models import DenseNet, PreResNet, ResNeXt
from states import perturbed_variables

# Channels before the transition: 4 of the stem, 2 of layer 1 (4, 5), 2 of layer 2 (6, 7).
DENSENET_BC = DenseNet(5, (2, 1), growth=2, compression=0.5)


def variables_of(model):
    return perturbed_variables(model, SHAPE, seed=0)


def layouts_of(model, variables, **options):
    plan = selconv_jax.plan_compaction(model, variables, compare=False, **options)
    return dict(plan.model.layouts), dict(plan.model.widths)


def test_a_dense_layer_that_is_read_by_no_one_is_removed():
    variables = variables_of(DENSENET_BC)
    for reader in ("block1_layer2/conv1", "transition1"):
        variables = close(variables, reader, [4, 5])
    plan, small = assert_same_function(DENSENET_BC, variables)
    layouts = dict(plan.model.layouts)
    assert layouts["block1_layer1/conv1"] == LayerLayout(inputs=4, own=(), copied=(), outputs=0)
    assert layouts["block1_layer1/conv2"] == LayerLayout(inputs=0, own=(), copied=(), outputs=0)
    assert layouts["block1_layer2/conv1"] == LayerLayout(inputs=4, own=(0, 1, 2, 3), copied=(), outputs=8)
    assert layouts["transition1"] == LayerLayout(inputs=6, own=(0, 1, 2, 3, 4, 5), copied=(), outputs=4)
    assert plan.model.widths == ()
    assert "block1_layer1" not in small["params"]
    # conv1 and conv2 of the layer; the rows, batch norms of its 2 channels in the two that read them.
    removed = (4 * 8 + 2 * 4) + (9 * 8 * 2 + 2 * 8) + 2 * (8 + 2) + 2 * (4 + 2)
    # All shifts: of the five selective layers' 4, 6, 8, 4 channels, as nothing is copied.
    removed += 2 * (4 + 6 + 8 + 4)
    assert count_parameters(variables["params"]) - count_parameters(small["params"]) == removed


def test_a_stem_channel_that_is_read_by_no_one_is_removed():
    variables = variables_of(DENSENET_BC)
    for reader in ("block1_layer1/conv1", "block1_layer2/conv1", "transition1"):
        variables = close(variables, reader, [1])
    plan, small = assert_same_function(DENSENET_BC, variables)
    assert dict(plan.model.widths) == {"stem": 3}
    stem = np.asarray(variables["params"]["stem"]["kernel"])
    np.testing.assert_array_equal(small["params"]["stem"]["kernel"], stem[..., [0, 2, 3]])
    # A single reader, and be it a copy, keeps the channel; the copy's own, 7, has none left.
    layouts, widths = layouts_of(DENSENET_BC, copy(variables, "transition1", 7, 1))
    assert widths == {}
    # All seven that arrive are used, so the copy is computed where its source arrives.
    assert layouts["transition1"] == LayerLayout(
        inputs=7, own=(0, 2, 3, 4, 5, 6), copied=(1,), outputs=4, order=(0, 6, 1, 2, 3, 4, 5)
    )
    assert layouts["transition1"].is_in_place


def test_cast_parameters_compute_in_their_type():
    """A network without a ``dtype`` computes in the type that its parameters were cast to, and so does the
    compacted one, also where nothing is left of a layer."""

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            unread = SelectiveConv(4, (3, 3), name="unread")(x, train)
            x = jnp.concatenate([x, unread], axis=-1)
            return SelectiveConv(2, (1, 1), name="last")(x, train)

    x = images(SHAPE)
    channels = x.shape[-1]
    variables = close(
        perturbed_variables(Network(), SHAPE, seed=0), "last", [0, *range(channels, channels + 4)]
    )
    variables = copy(variables, "last", 1, 2)
    model, small = selconv_jax.compact(Network(), variables, x)
    assert set(small["params"]) == {"last"}
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        whole_cast, small_cast = (
            {**each, "params": jax.tree.map(lambda a, dtype=dtype: a.astype(dtype), each["params"])}
            for each in (variables, small)
        )
        for train in (False, True):
            expected, actual = (
                each.apply(values, x.astype(dtype), train=train, mutable=["batch_stats"])[0]
                for each, values in ((Network(), whole_cast), (model, small_cast))
            )
            assert actual.dtype == expected.dtype == dtype
            np.testing.assert_allclose(
                actual.astype(np.float32), expected.astype(np.float32), rtol=0.05, atol=0.05
            )


def test_outputs_before_a_gate_go_with_it():
    model = NETWORKS["preresnet"]
    variables = close(variables_of(model), "block1_layer1/conv2", [1, 2])
    plan, small = assert_same_function(model, variables)
    layouts = dict(plan.model.layouts)
    assert layouts["block1_layer1/conv1"].outputs == 2
    assert layouts["block1_layer1/conv2"] == LayerLayout(inputs=2, own=(0, 1), copied=(), outputs=4)
    kernel = np.asarray(variables["params"]["block1_layer1"]["conv1"]["kernel"])
    np.testing.assert_array_equal(small["params"]["block1_layer1"]["conv1"]["kernel"], kernel[..., [0, 3]])


def test_sums_that_the_classifier_reads_stay_whole():
    model = NETWORKS["preresnet"]
    variables = variables_of(model)
    for reader in ("block1_layer1/conv1", "block2_layer1/conv1"):
        variables = close(variables, reader, [0, 2])
    plan, _ = assert_same_function(model, variables)
    layouts = dict(plan.model.layouts)
    assert plan.model.widths == ()
    assert layouts["block2_layer1/conv1"].inputs == 16
    assert layouts["block2_layer1/conv1"].own == (1, *range(3, 16))
    assert layouts["block1_layer1/conv3"].outputs == 16


def test_groups_lose_equally_many():
    model = NETWORKS["resnext"]  # conv2 makes two groups of 4
    variables = close(variables_of(model), "block1_layer1/conv3", [0, 1, 2, 4])
    plan, _ = assert_same_function(model, variables)
    layouts = dict(plan.model.layouts)
    conv2 = layouts["block1_layer1/conv2"]
    # One of the first group and three of the second are read: three of each stay.
    assert (conv2.inputs, conv2.reads, conv2.outputs, conv2.groups, conv2.idle) == (8, 8, 6, 2, ())
    assert layouts["block1_layer1/conv3"] == LayerLayout(inputs=6, own=(2, 3, 4, 5), copied=(), outputs=64)
    assert layouts["block1_layer1/conv1"].outputs == 8


def test_a_group_that_is_read_by_no_one_is_removed():
    model = NETWORKS["resnext"]
    variables = close(variables_of(model), "block1_layer1/conv3", [0, 1, 2, 3, 7])
    plan, small = assert_same_function(model, variables)
    layouts = dict(plan.model.layouts)
    assert layouts["block1_layer1/conv2"] == LayerLayout(inputs=4, own=(0, 1, 2, 3), copied=(), outputs=3)
    assert layouts["block1_layer1/conv1"].outputs == 4
    assert small["params"]["block1_layer1"]["conv2"]["kernel"].shape == (3, 3, 4, 3)


@pytest.mark.parametrize(
    ("closed", "multiple", "inputs", "idle"),
    [(5, 8, 16, 5), (9, 8, 8, 1), (8, 8, 8, 0), (9, 1, 7, 0), (15, 8, 8, 7), (3, 128, 16, 3)],
)
def test_widths_are_rounded_up(closed, multiple, inputs, idle):
    model = PreResNet(5, (1,), width=16)
    variables = close(variables_of(model), "block1_layer1/conv2", np.arange(closed))
    layouts, _ = layouts_of(model, variables, multiple=multiple)
    assert layouts["block1_layer1/conv1"].outputs == inputs
    conv2 = layouts["block1_layer1/conv2"]
    assert (conv2.inputs, conv2.own) == (inputs, tuple(range(inputs)))
    assert conv2.idle == tuple(range(idle))
    small = selconv_jax.plan_compaction(model, variables, multiple=multiple, compare=False).take(variables)
    kernel = np.asarray(small["params"]["block1_layer1"]["conv2"]["kernel"])
    assert (kernel[:, :, :idle] == 0).all()
    assert (kernel[:, :, idle:] != 0).any(axis=(0, 1, 3)).all()


def test_the_stem_says_how_large_the_example_is():
    for stem, blocks in (("cifar", (1,) * 7), ("tiny_imagenet", (1, 1)), ("imagenet", (1,) * 8)):
        model = ResNeXt(5, blocks, groups=2, base_width=1, widen=1, stem=stem)
        image = jax.ShapeDtypeStruct((1, 1024, 1024, 1), np.float32)
        variables = jax.eval_shape(lambda x, m=model: m.init(jax.random.key(0), x, train=False), image)
        gates = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), variables["selectivity"])
        gates["block1_layer1"]["conv3"]["gate"][:] = [True, False]
        sources = [layer for block in gates.values() for layer in block.values()]
        for layer in sources:
            layer["source"][:] = -1
        layouts, _ = layouts_of(model, {**variables, "selectivity": gates})
        assert layouts["block1_layer1/conv2"].groups == 1


class Supervised(nn.Module):
    """A network whose training mode needs an argument, and reads channels that its evaluation does not."""

    @nn.compact
    def __call__(self, x, key, train, labels=None):
        x = x + jax.random.normal(key, x.shape)
        x = selconv_jax.SelectiveConv(6, (1, 1), name="layer")(nn.Conv(4, (1, 1), name="stem")(x), train)
        logits = selconv_jax.SelectiveConv(3, (1, 1), name="head")(x, train).mean((1, 2))
        return (logits, ((x.mean((1, 2, 3)) - labels) ** 2).mean()) if train else logits


def test_training_with_arguments_of_its_own():
    model, key, x, labels = Supervised(), jax.random.key(1), jnp.ones((2, 4, 4, 3)), jnp.ones(2)
    variables = model.init(key, x, key, train=False)
    variables["selectivity"]["head"]["gate"] = jnp.arange(6) < 2
    with pytest.warns(
        UserWarning, match="cannot be traced with train=True, .* arguments of training by name"
    ):
        small, small_variables = selconv_jax.compact(model, variables, x, key)
    expected = model.apply(variables, x, key, train=False)
    np.testing.assert_allclose(small.apply(small_variables, x, key, train=False), expected, rtol=1e-5)
    assert small_variables["params"]["layer"]["kernel"].shape[-1] == 2
    small, small_variables = selconv_jax.compact(model, variables, x, key, labels=labels)
    assert small_variables["params"]["layer"]["kernel"].shape[-1] == 6
    losses = [
        network.apply(values, x, key, train=True, labels=labels, mutable=["batch_stats"])[0][1]
        for network, values in ((model, variables), (small, small_variables))
    ]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_inputs_of_another_number_of_channels():
    model, x = nn.Sequential([nn.Conv(4, (1, 1)), SelectiveLast()]), jnp.ones((1, 3, 3, 2))
    variables = model.init(jax.random.key(0), x)
    with pytest.raises(
        ConfigError, match=r"layer 'layers_0' takes a kernel of shape \(1, 1, 3, 4\), but it has"
    ):
        selconv_jax.compact(model, variables, jnp.ones((1, 3, 3, 3)))


class SelectiveLast(nn.Module):
    @nn.compact
    def __call__(self, x):
        return selconv_jax.SelectiveConv(2, (1, 1))(x, False)
