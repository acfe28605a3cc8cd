"""What was not proved is left whole: shared variables, widths without a literal; comparison on numbers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import selconv_jax
from compactions import assert_equal_trees, assert_same_function, close, images, quick_jit
from selconv_jax import ConfigError, SelectiveConv
from selconv_jax._xla.batch_norm import Statistics, batch_statistics
from selconv_jax.compaction import LayerLayout
from selconv_jax.compaction import _plan as planning
from states import perturbed_variables

SHAPE = (2, 6, 6, 8)


class Read(nn.Module):
    """A layer, or the convolution before it, with parameters that something else reads."""

    how: str

    @nn.compact
    def __call__(self, x, train):
        stem = nn.Conv(8, (3, 3), name="stem")
        if self.how == "normalized convolution":
            stem = nn.WeightNorm(stem, name="norm")
        x = stem(x)
        layer = SelectiveConv(4, (3, 3), name="layer")
        if self.how == "normalized":
            # Flax before 0.12.12 lets no statistics move within.
            return nn.WeightNorm(layer)(x, False)
        y = layer(x, train)
        if self.is_initializing():
            return y
        params = self.variables["params"]
        kernel = params["layer"]["kernel"]
        if self.how == "tied":
            return jax.lax.conv_transpose(y, kernel.swapaxes(-1, -2), (1, 1), "SAME").sum(-1)
        if self.how == "penalty":
            return y, jnp.square(kernel).sum()
        if self.how == "inner program":
            return y * jax.jit(lambda kernel: jnp.square(kernel).mean())(kernel)
        if self.how == "loop":
            return jax.lax.fori_loop(0, 2, lambda _, y: y * jnp.square(kernel).mean(), y)
        if self.how == "returned":
            return y, kernel
        if self.how == "statistics":
            return y + self.variables["batch_stats"]["layer"]["mean"].sum()
        if self.how == "gate":
            return y * jnp.mean(self.variables["selectivity"]["layer"]["gate"].astype(y.dtype))
        if self.how == "training" and train:
            return y + jnp.square(kernel).mean()
        if self.how == "convolution":
            return y + jnp.square(params["stem"]["kernel"]).sum()
        return y


@pytest.mark.parametrize(
    ("how", "is_left"),
    [
        ("normalized", True),
        ("tied", True),
        ("penalty", True),
        ("inner program", True),
        ("loop", True),
        ("returned", True),
        ("statistics", True),
        ("gate", True),
        ("training", True),
        ("convolution", False),
        ("normalized convolution", False),
    ],
)
def test_variables_that_something_else_reads(how, is_left):
    model = Read(how)
    variables = close(perturbed_variables(model, SHAPE, seed=0), "layer", [0, 3, 4])
    plan, small = same_outputs(model, variables)
    assert plan.model.widths == ()
    assert [path for path, _ in plan.model.layouts] == ([] if is_left else ["layer"])
    if is_left:
        assert_equal_trees(small, variables)


def same_outputs(model, variables, x=None, **options):
    """In evaluation and training, of a plan that is not compared on numbers."""
    x = images(SHAPE) if x is None else x
    plan = selconv_jax.plan_compaction(model, variables, x, compare=False, **options)

    @quick_jit
    def run(variables):
        small = plan.take(variables)
        return [
            (
                network.apply(tree, x, train=False),
                network.apply(tree, x, train=True, mutable=["batch_stats"])[0],
            )
            for network, tree in ((model, variables), (plan.model, small))
        ]

    expected, actual = run(variables)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * np.abs(other).max())
    return plan, plan.take(variables)


class Wide(nn.Module):
    """Numbers that come from a width without being written down; not all of them in evaluation."""

    how: str

    @nn.compact
    def __call__(self, x, train):
        y = SelectiveConv(8, (3, 3), name="first")(x, train)
        width = y.shape[-1]
        epsilon, padding = 1e-5, "SAME"
        if self.how == "ones":
            y = y / jnp.ones(width).sum()
        elif self.how == "ones alike":
            y = y / jnp.ones_like(y).sum(-1, keepdims=True)
        elif self.how == "indices":
            y = y / jnp.arange(1.0, width + 1).max()
        elif self.how == "constant":
            y = y * np.array([1 / width], np.float32).reshape(1, 1, 1, 1)
        elif self.how == "length of a loop":
            y = jax.lax.fori_loop(0, width, lambda _, y: 0.9 * y, y)
        elif self.how == "power":
            y = jax.lax.integer_pow(y, 2 + width % 2)
        elif self.how == "product":
            y = y * jnp.dot(jnp.ones(width), jnp.ones(width))
        elif self.how == "rows":
            y = y + jnp.pad(y[:, : 7 - width], ((0, 0), (max(0, width - 2), 0), (0, 0), (0, 0)))[:, :6].sum()
        elif self.how == "epsilon":
            epsilon = 1 / width
        elif self.how == "another convolution":
            padding = ((width, 0), (0, width))
        elif self.how == "training" and train:
            y = y / float(width)
        y = SelectiveConv(4, (3, 3), epsilon=epsilon, padding=padding, name="second")(y, train)
        return y.sum(axis=(1, 2))


@pytest.mark.parametrize(
    "how",
    [
        "ones",
        "ones alike",
        "indices",
        "constant",
        "length of a loop",
        "power",
        "product",
        "rows",
        "epsilon",
        "another convolution",
        "training",
    ],
)
def test_numbers_that_come_from_widths(how):
    model = Wide(how)
    variables = close(perturbed_variables(model, SHAPE, seed=0), "second", [0, 3, 4])
    plan, _ = same_outputs(model, variables)
    layouts = dict(plan.model.layouts)
    assert (layouts["first"].outputs, layouts["second"].reads) == (8, 5)


@pytest.mark.parametrize("order", ["channels first", "mask first"])
@pytest.mark.parametrize("mask", ["convolution", "layer", "mean", "image"])
def test_a_single_channel_meets_all_others(mask, order):
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            y = SelectiveConv(8, (3, 3), name="first")(x, train)
            if mask == "convolution":
                one = nn.Conv(1, (3, 3), name="mask")(x)
            elif mask == "layer":
                one = SelectiveConv(1, (3, 3), name="mask")(x, train)
            else:
                one = x.mean(axis=-1, keepdims=True) if mask == "mean" else x[..., :1]
            one = nn.sigmoid(one)
            y = y * one if order == "channels first" else one * y
            return SelectiveConv(4, (3, 3), name="second")(y, train)

    model = Network()
    variables = close(perturbed_variables(model, SHAPE, seed=0), "second", [0, 3, 4])
    plan, _ = same_outputs(model, variables)
    assert dict(plan.model.layouts)["first"].outputs == 5
    assert dict(plan.model.layouts)["second"] == LayerLayout(
        inputs=5, own=tuple(range(5)), copied=(), outputs=4
    )


def test_an_ensemble_of_one_input():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = SelectiveConv(8, (3, 3), name="trunk")(x, train)
            axes = {"params": 0, "batch_stats": 0, "selectivity": 0}
            heads = nn.vmap(
                SelectiveConv,
                variable_axes=axes,
                split_rngs={"params": True},
                in_axes=(None, None),
                axis_size=3,
            )
            return heads(4, (3, 3), name="heads")(x, train)

    variables = perturbed_variables(Network(), SHAPE, seed=0, closed=0.4, copies=0.2)
    plan, small = assert_same_function(Network(), variables, images(SHAPE))
    assert [path for path, _ in plan.model.layouts] == ["trunk"]
    assert set(small["selectivity"]) == {"heads"}


class Called(nn.Module):
    """Called in other ways than ``apply(variables, x, train=...)``."""

    def setup(self):
        self.first = SelectiveConv(8, (3, 3))
        self.second = SelectiveConv(4, (3, 3))

    def __call__(self, x, scale):
        return self.features(x, train=False) * scale

    def features(self, x, train):
        return self.second(self.first(x, train), train)


def test_other_ways_of_calling():
    model, x, scale = Called(), images(SHAPE), jnp.ones((2, 1, 1, 4))
    variables = model.init(jax.random.key(0), x, scale)
    variables = close(variables, "second", [0, 3])
    expected = model.apply(variables, x, scale)
    small_model, small = selconv_jax.compact(model, variables, x, scale, multiple=np.int64(2))
    assert dict(small_model.layouts)["first"].outputs == 6
    np.testing.assert_allclose(small_model.apply(small, x, scale), expected, rtol=1e-5, atol=1e-5)
    small_model, small = selconv_jax.compact(model, variables, x, scale=scale)
    np.testing.assert_allclose(small_model.apply(small, x, scale=scale), expected, rtol=1e-5, atol=1e-5)
    assert dict(small_model.layouts)["first"].outputs == 6
    for options in ({"train": False}, {"train": True}):  # for one of its modes alone
        small_model, small = selconv_jax.compact(model, variables, x, method="features", **options)
        assert dict(small_model.layouts)["first"].outputs == 6
    for method in ("features", Called.features):
        small_model, small = selconv_jax.compact(model, variables, x, method=method)
        assert dict(small_model.layouts)["first"].outputs == 6
        actual = small_model.apply(small, x, train=False)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
        # As the whole network is called, and bound.
        np.testing.assert_array_equal(small_model.apply(small, x, False, method="features"), actual)
        np.testing.assert_array_equal(small_model.bind(small).features(x, train=False), actual)
        assert not hasattr(small_model, "strides")
    small_model, small = selconv_jax.compact(model, variables, x, scale)
    with pytest.raises(AttributeError, match=r"only '__call__' was compacted.*method='features'"):
        small_model.apply(small, x, False, method="features")


def test_calls_that_fail_are_refused_in_a_line():
    model, x, scale = Called(), images(SHAPE), jnp.ones((2, 1, 1, 4))
    variables = model.init(jax.random.key(0), x, scale)
    for inputs, method, message in (
        ((x,), None, r"does not run as model\.apply\(variables, \*inputs\): .*scale"),
        ((x, scale, scale), None, "does not run as"),
        ((x[..., :7],), "features", "takes a kernel of shape"),
        ((x,), "other", "has no such method"),
        (("image",), "features", r"the inputs \(str\) hold more than arrays"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            selconv_jax.compact(model, variables, *inputs, method=method)
        assert "\n" not in str(caught.value)
    boxed = {**variables, "params": jax.tree.map(lambda a: nn.Partitioned(a, (None,)), variables["params"])}
    with pytest.raises(ConfigError, match="Unbox"):
        selconv_jax.compact(model, boxed, x, scale)
    shapes = jax.eval_shape(lambda: variables)
    with pytest.raises(ValueError, match="gates and sources are shapes"):
        selconv_jax.compact(model, shapes, x, scale)


def test_layers_that_are_differentiated_stay():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            layer = SelectiveConv(4, (3, 3), name="layer")
            return layer(x, train) if self.is_initializing() else jax.grad(lambda x: layer(x, train).sum())(x)

    variables = close(perturbed_variables(Network(), SHAPE, seed=0), "layer", [0])
    with pytest.warns(UserWarning, match="cannot be followed.*nothing is removed"):
        small_model, small = selconv_jax.compact(Network(), variables, images(SHAPE))
    assert small_model.layouts == ()
    assert_equal_trees(small, variables)


def test_no_tracer_is_leaked():
    layer = SelectiveConv(4, (3, 3))
    variables = close(perturbed_variables(layer, SHAPE, seed=0), "", [0])
    with jax.checking_leaks():
        small_model, _ = selconv_jax.compact(layer, variables, images(SHAPE))
    assert dict(small_model.layouts)[""].reads == 7


def test_other_numbers_are_noticed(monkeypatch):
    """Where what is known of the programs is wrong, the comparison takes the safe plan, or none."""
    model = Wide("ones")
    variables = close(perturbed_variables(model, SHAPE, seed=0), "second", [0, 3, 4])
    monkeypatch.setattr(planning, "joins_the_same", lambda *arguments: True)
    with pytest.warns(UserWarning, match="computed different outputs, so less is removed"):
        small_model, small = selconv_jax.compact(model, variables, images(SHAPE))
    assert dict(small_model.layouts)["first"].outputs == 8
    assert dict(small_model.layouts)["second"].reads == 5
    expected = model.apply(variables, images(SHAPE), train=False)
    actual = small_model.apply(small, images(SHAPE), train=False)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(planning, "same_numbers", lambda *arguments: False)
    with (
        pytest.warns(UserWarning, match="nothing is removed"),
        pytest.warns(UserWarning, match="less is removed"),
    ):
        small_model, small = selconv_jax.compact(model, variables, images(SHAPE))
    assert small_model.layouts == ()
    assert_equal_trees(small, variables)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_rounding_is_no_difference(dtype, recwarn):
    """The types inside of the network count, not those it takes and returns."""

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            for number in range(3):
                x = SelectiveConv(8, (3, 3), dtype=dtype, name=f"layer{number}")(x, train)
            return x.astype(jnp.float32)

    variables = perturbed_variables(Network(), SHAPE, seed=0, closed=0.4)
    small_model, _ = selconv_jax.compact(Network(), variables, images(SHAPE))
    assert not recwarn.list
    assert dict(small_model.layouts)["layer0"].outputs < 8


def test_a_sequence_takes_no_train():
    class Evaluated(nn.Module):
        @nn.compact
        def __call__(self, x):
            return SelectiveConv(8, (3, 3), name="layer")(x, train=False)

    model = nn.Sequential([Evaluated(), nn.relu, Evaluated()])
    variables = model.init(jax.random.key(0), images(SHAPE))
    variables = close(variables, "layers_2/layer", [0, 3])
    small_model, small = selconv_jax.compact(model, variables, images(SHAPE))
    assert dict(small_model.layouts)["layers_0/layer"].outputs == 6
    expected = model.apply(variables, images(SHAPE))
    np.testing.assert_allclose(small_model.apply(small, images(SHAPE)), expected, rtol=1e-5, atol=1e-5)


def test_inside_of_a_traced_program():
    """With variables that have values, though what surrounds it is traced."""
    layer = SelectiveConv(4, (3, 3))
    variables = close(perturbed_variables(layer, SHAPE, seed=0), "", [0])

    def run(x):
        small_model, small = selconv_jax.compact(layer, variables, images(SHAPE))
        return small_model.apply(small, x, train=False)

    expected = layer.apply(variables, images(SHAPE), train=False)
    np.testing.assert_allclose(jax.jit(run)(images(SHAPE)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_reversed", [False, True])
def test_known_statistics_go_with_their_channels(is_reversed):
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            y = SelectiveConv(8, (3, 3), name="first")(x, train)
            known = batch_statistics(y)
            if is_reversed:  # which belong to other channels
                known = Statistics(known.mean[::-1], known.var[::-1])
            return SelectiveConv(4, (3, 3), name="second")(y, train, known if train else None)

    variables = close(perturbed_variables(Network(), SHAPE, seed=0), "second", [0, 3, 5])
    plan, _ = same_outputs(Network(), variables)
    assert dict(plan.model.layouts)["first"].outputs == (8 if is_reversed else 5)
