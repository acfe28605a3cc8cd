"""Compaction of users' own models: joins of every kind, code tied to widths, stacks, derived layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import selconv_jax
from compactions import assert_same_function, close, copy, images, quick_jit
from selconv_jax import BatchNormReLUConv, SelectiveConv
from states import perturbed_variables

SHAPE = (2, 6, 6, 3)


class Joined(nn.Module):
    """A concatenation, a sum, pools; what is read at the end is known to the gates of ``last``."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(6, (3, 3), name="stem")(x)
        y = SelectiveConv(4, (3, 3), name="left")(x, train)
        z = nn.relu(BatchNormReLUConv(4, (1, 1), name="right")(x, train))
        x = jnp.concatenate([y, nn.max_pool(x, (3, 3), padding="SAME"), z], axis=-1)
        x = nn.pooling.pool(x, 0.0, jax.lax.add, (2, 2), (2, 2), "VALID")
        x = x / 4.0 + SelectiveConv(14, (1, 1), name="sum")(x, train)
        x = SelectiveConv(5, (3, 3), name="last")(x, train)
        return nn.Dense(3, name="head")(x.mean(axis=(1, 2)))


def test_removal_through_joins():
    model = Joined()
    variables = perturbed_variables(model, SHAPE, seed=0)
    for reader in ("sum", "last"):
        variables = close(variables, reader, [0, 3, 5, 11])  # two of the left, the stem's 1, right's 1
    variables = close(variables, "left", [1])
    plan, small = assert_same_function(model, variables, images(SHAPE))
    layouts = dict(plan.model.layouts)
    assert layouts["left"].outputs == 2
    assert layouts["right"].outputs == 3
    assert plan.model.widths == ()  # the plain layer reads the whole stem, so its 1 stays in the sum
    assert (layouts["sum"].inputs, layouts["sum"].reads, layouts["sum"].outputs) == (11, 10, 11)
    assert small["params"]["last"]["kernel"].shape == (3, 3, 10, 5)


def test_a_convolution_of_flax_makes_fewer():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Conv(6, (3, 3), name="stem")(x)
            return SelectiveConv(4, (3, 3), name="conv")(x, train)

    variables = close(perturbed_variables(Network(), SHAPE, seed=0), "conv", [1, 2])
    variables = copy(variables, "conv", 5, 2)
    plan, small = assert_same_function(Network(), variables, images(SHAPE))
    assert dict(plan.model.widths) == {"stem": 4}  # 5 is a copy of 2 now
    assert small["params"]["stem"]["bias"].shape == (4,)
    assert dict(plan.model.layouts)["conv"].copied == (1,)
    everything = close(variables, "conv", np.arange(6))
    assert_same_function(Network(), everything, images(SHAPE))


class TiedToWidths(nn.Module):
    """Code that knows how many channels there are."""

    how: str

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(8, (3, 3), name="stem")(x)
        y = SelectiveConv(8, (3, 3), name="first")(x, train)
        if self.how == "pads to a number":
            y = jnp.pad(y, ((0, 0), (0, 0), (0, 0), (0, 16 - y.shape[-1])))
        elif self.how == "pads by a number":
            y = jnp.pad(y, ((0, 0), (0, 0), (0, 0), (0, 8)))
        elif self.how == "shuffles":
            y = y.reshape(*y.shape[:-1], 2, -1).swapaxes(-1, -2).reshape(y.shape)
        elif self.how == "takes the first":
            y = y[..., :4]
        elif self.how == "scales by the width":
            y = y / jnp.sqrt(jnp.float32(y.shape[-1]))
        elif self.how == "scales by its inverse":
            y = y * (1 / y.shape[-1])
        elif self.how == "normalizes":
            y = nn.LayerNorm()(y)
        elif self.how == "adds half":
            y = y[..., : y.shape[-1] // 2] + y[..., y.shape[-1] // 2 :]
        elif self.how == "adds a parameter":
            y = y + self.param("offset", nn.initializers.normal(), (1, 1, 1, 8))
        elif self.how == "trains with noise" and train:
            y = y + jnp.ones((1, 1, 1, 8))
        return SelectiveConv(4, (3, 3), name="second")(y, train)


@pytest.mark.parametrize(
    ("how", "is_tied"),
    [
        ("pads to a number", True),
        ("pads by a number", False),
        ("shuffles", True),
        ("takes the first", True),
        ("scales by the width", True),
        ("scales by its inverse", True),
        ("normalizes", True),
        ("adds half", True),
        ("adds a parameter", True),
        ("trains with noise", True),
    ],
)
def test_code_that_is_tied_to_widths(how, is_tied):
    model = TiedToWidths(how)
    variables = perturbed_variables(model, SHAPE, seed=0)
    channels = len(variables["selectivity"]["second"]["gate"])
    variables = close(variables, "second", [1, 2, min(channels, 8) - 1])
    variables = close(variables, "first", [0, 4, 5])
    plan = selconv_jax.plan_compaction(model, variables, images(SHAPE), compare=False)

    @quick_jit
    def run(variables):
        whole = model.apply(variables, images(SHAPE), train=False)
        return whole, plan.model.apply(plan.take(variables), images(SHAPE), train=False)

    expected, actual = run(variables)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    layouts = dict(plan.model.layouts)
    assert layouts["first"].reads == 5
    assert layouts["second"].reads == channels - 3
    assert layouts["first"].outputs == (8 if is_tied else 5)


class Block(nn.Module):
    """Its layers are made in ``setup``."""

    def setup(self):
        self.narrow = SelectiveConv(4, (1, 1))
        self.wide = SelectiveConv(6, (3, 3))

    def __call__(self, x, train):
        return x + self.wide(self.narrow(x, train), train)


def test_layers_of_setup_and_under_remat():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Conv(6, (1, 1), name="stem")(x)
            x = Block(name="plain")(x, train)
            x = nn.remat(Block, static_argnums=(2,))(name="lean")(x, train)
            return x.mean(axis=(1, 2))

    variables = perturbed_variables(Network(), SHAPE, seed=2)
    for block in ("plain", "lean"):
        variables = close(variables, f"{block}/wide", [0, 1])
        variables = copy(close(variables, f"{block}/narrow", [5]), f"{block}/narrow", 2, 3)
    plan, small = assert_same_function(Network(), variables, images(SHAPE))
    for block in ("plain", "lean"):
        assert small["params"][block]["narrow"]["kernel"].shape == (1, 1, 5, 2)
    assert len(plan.model.layouts) == 4
    captured, expected = (
        model.apply(values, images(SHAPE), train=False, capture_intermediates=True)[1]
        for model, values in ((plan.model, small), (Network(), variables))
    )
    assert jax.tree.structure(captured) == jax.tree.structure(expected)  # each result once


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return x + SelectiveConv(6, (3, 3), name="conv")(x, train), None


AXES = {"params": 0, "batch_stats": 0, "selectivity": 0}


@pytest.mark.parametrize("how", ["scan", "vmap"])
def test_stacks_stay_as_they_are(how):
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = SelectiveConv(6, (1, 1), name="before")(x, train)
            if how == "scan":
                steps = nn.scan(
                    Step, variable_axes=AXES, split_rngs={"params": True}, in_axes=nn.broadcast, length=2
                )
                x = steps(name="stack")(x, train)[0]
            else:
                two = nn.vmap(
                    Step,
                    variable_axes=AXES,
                    split_rngs={"params": True},
                    in_axes=(0, None),
                    out_axes=(0, None),
                )
                x = two(name="stack")(jnp.stack([x, x]), train)[0].mean(axis=0)
            x = SelectiveConv(6, (1, 1), name="between")(x, train)
            return SelectiveConv(4, (1, 1), name="after")(x, train)

    model = Network()
    variables = perturbed_variables(model, SHAPE, seed=1, closed=0.4, copies=0.3)
    plan, small = assert_same_function(model, variables, images(SHAPE))
    assert {path for path, _ in plan.model.layouts} == {"before", "between", "after"}
    layouts = dict(plan.model.layouts)
    assert layouts["before"].outputs == 6
    assert layouts["between"].outputs < 6
    assert set(small["selectivity"]) == {"stack"}


def test_a_layer_that_is_called_twice():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Conv(6, (1, 1), name="stem")(x)
            layer = SelectiveConv(6, (1, 1), name="twice")
            x = layer(layer(x, train), train)
            return SelectiveConv(4, (1, 1), name="last")(x, train)

    variables = close(perturbed_variables(Network(), SHAPE, seed=1), "last", [0, 1])
    variables = close(variables, "twice", [1, 2])
    plan, _ = assert_same_function(Network(), variables, images(SHAPE))
    # Channel 0 is read by the second call, channel 1 by none.
    assert dict(plan.model.layouts)["twice"].outputs == 5
    assert dict(plan.model.widths) == {"stem": 5}


def test_a_derived_layer_stays_as_it_is():
    class Own(SelectiveConv):
        pass

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = SelectiveConv(6, (1, 1), name="before")(x, train)
            return Own(4, (1, 1), name="own")(x, train)

    variables = perturbed_variables(Network(), SHAPE, seed=1, closed=0.5)
    plan, small = assert_same_function(Network(), variables, images(SHAPE))
    assert set(small["selectivity"]) == {"own"}
    assert [path for path, _ in plan.model.layouts] == ["before"]


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (SelectiveConv(4, (3, 3), strides=2, padding="CIRCULAR"), (2, 5, 6, 7)),
        (SelectiveConv(6, (3,), feature_group_count=3, kernel_dilation=2), (2, 9, 12)),
        (SelectiveConv(8, (2, 1, 2), feature_group_count=2), (2, 3, 2, 4, 8)),
        (SelectiveConv(6, (3, 3), feature_group_count=6, gate_only=True), (2, 5, 5, 6)),
    ],
    ids=["strides", "1-D groups", "3-D groups", "depthwise"],
)
def test_single_layers(layer, shape):
    """A model that is one layer; copies from group to group."""
    for seed in range(2):
        variables = perturbed_variables(layer, shape, seed=seed, closed=0.4, copies=0.4)
        plan, small = assert_same_function(layer, variables, images(shape))
        assert "selectivity" not in small
        assert [path for path, _ in plan.model.layouts] == [""]


def test_a_model_inside_of_another():
    class Outer(nn.Module):
        inner: nn.Module

        @nn.compact
        def __call__(self, x, train):
            return nn.Dense(2)(self.inner(x, train).mean(axis=(1, 2)))

    layer = SelectiveConv(4, (3, 3))
    variables = perturbed_variables(layer, SHAPE, seed=0, closed=0.5)
    small_model, small = selconv_jax.compact(layer, variables, images(SHAPE))
    outer = Outer(small_model)
    init = outer.init(jax.random.key(0), images(SHAPE), train=False)
    shapes = jax.tree.map(jnp.shape, init["params"]["inner"])
    assert shapes == jax.tree.map(jnp.shape, small["params"])


def test_variables_that_do_not_fit():
    layer = SelectiveConv(4, (3, 3))
    variables = perturbed_variables(layer, SHAPE, seed=0)
    wrong = {**variables, "selectivity": {**variables["selectivity"], "gate": jnp.ones((2, 3), bool)}}
    with pytest.raises(ValueError, match="gate"):
        selconv_jax.compact(layer, wrong, images(SHAPE))
