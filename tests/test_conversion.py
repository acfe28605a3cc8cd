"""Networks of ordinary Flax layers converted to selective ones."""

from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import selconv_jax
from selconv_jax import AllocationRule, ConfigError, SelectiveConv, selectivize_model
from selconv_jax.analysis import count_parameters
from states import perturbed_variables

X = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))


class Block(nn.Module):
    features: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, train):
        y = nn.relu(nn.BatchNorm(not train, momentum=0.8, epsilon=1e-3)(x))
        y = nn.Conv(self.features, (3, 3), use_bias=False)(y)
        y = jnp.maximum(nn.BatchNorm(not train)(x=y), 0)
        if self.dropout:
            y = nn.Dropout(self.dropout)(y, deterministic=not train)
        y = nn.Conv(self.features, (1, 1), strides=2, padding="VALID", use_bias=False)(inputs=y)
        return nn.Conv(self.features, (1, 1), strides=2)(x) + y


class Network(nn.Module):
    dropout: float = 0.0
    block: type = Block

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(8, (3, 3), name="stem")(x)
        x = self.block(12, self.dropout, name="one")(x, train)
        x = self.block(16, self.dropout, name="two")(x, train)
        return nn.Dense(5)(nn.relu(nn.BatchNorm(not train)(x)).mean((1, 2)))


CONVERTED = {
    "one/Conv_0": "one/BatchNorm_0",
    "one/Conv_1": "one/BatchNorm_1",
    "two/Conv_0": "two/BatchNorm_0",
    "two/Conv_1": "two/BatchNorm_1",
}


def trained(model, **options):
    return perturbed_variables(model, X.shape, seed=0, **options)


@pytest.mark.parametrize("block", [Block, nn.remat(Block, static_argnums=(2,))], ids=["plain", "remat"])
def test_same_function_and_gradients(block):
    plain = Network(block=block)
    variables = trained(plain)
    result = selectivize_model(plain, variables, X)
    assert result.converted == CONVERTED
    assert result.left == {
        "stem": "its input is not the ReLU of a batch norm",
        "one/Conv_2": "its input is not the ReLU of a batch norm",
        "two/Conv_2": "its input is not the ReLU of a batch norm",
    }
    assert "4 of 7 convolutions are selective" in result.summary()

    @partial(jax.jit, static_argnums=(0, 3))
    def run(model, variables, x, train):
        def loss(x):
            y, changed = model.apply(variables, x, train, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(y)), (y, changed)

        return jax.grad(loss, has_aux=True)(x)

    for train in (False, True):
        gradient, (y, changed) = run(result.model, result.variables, X, train)
        expected, (of_plain, plain_changed) = run(plain, variables, X, train)
        np.testing.assert_allclose(y, of_plain, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-5)
    means = changed["batch_stats"]["one"]["Conv_0"]["mean"]
    np.testing.assert_allclose(means, plain_changed["batch_stats"]["one"]["BatchNorm_0"]["mean"], rtol=1e-5)


def test_variables_are_those_of_a_new_network_and_of_layers():
    plain = Network()
    variables = trained(plain)
    result = selectivize_model(plain, variables, X)
    new = result.model.init(jax.random.key(1), X, train=False)
    chex.assert_trees_all_equal_shapes_and_dtypes(result.variables, new)
    kernel = variables["params"]["one"]["Conv_0"]["kernel"]
    assert result.variables["params"]["one"]["Conv_0"]["kernel"] is kernel
    layers = selconv_jax.layer_states(result.variables)
    assert sorted(layers) == sorted(CONVERTED)


def test_reallocated_trained_and_compacted():
    plain = Network()
    result = selectivize_model(plain, trained(plain), X)
    variables, report = selconv_jax.reallocate(
        result.variables, jax.random.key(0), AllocationRule(threshold=0.3, top_k=1)
    )
    assert report.copies > 0
    variables, report = selconv_jax.reallocate(
        variables, jax.random.key(1), AllocationRule(threshold=0.3, top_k=0)
    )
    assert report.deallocated > 0
    model = result.model.clone(capacity=selconv_jax.required_capacity(variables))
    _, changed = model.apply(variables, X, train=True, mutable=["batch_stats"])
    variables = {**variables, **changed}
    small, small_variables = selconv_jax.compact(model, variables, X)
    np.testing.assert_allclose(
        small.apply(small_variables, X, train=False),
        model.apply(variables, X, train=False),
        rtol=1e-4,
        atol=1e-5,
    )
    assert count_parameters(small_variables["params"]) < count_parameters(variables["params"])


def test_dropout_is_that_of_the_layer():
    plain = Network(dropout=0.5)
    variables = trained(plain)
    result = selectivize_model(plain, variables, X, gate_only=True)
    assert result.converted == CONVERTED
    assert "shift" not in result.variables["params"]["one"]["Conv_1"]
    expected = plain.apply(variables, X, train=False)
    np.testing.assert_allclose(
        result.model.apply(result.variables, X, train=False), expected, rtol=1e-4, atol=1e-5
    )
    first, second = (
        result.model.apply(
            result.variables, X, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(key)}
        )[0]
        for key in (0, 1)
    )
    assert (first != second).any()


@jax.custom_vjp
def straight_through(x):
    """A ReLU whose gradient is that of the identity."""
    return jnp.maximum(x, 0)


straight_through.defvjp(lambda x: (jnp.maximum(x, 0), None), lambda _, gradient: (gradient,))


@jax.custom_jvp
def relu(x):
    """The same, by the name of another function."""
    return jnp.maximum(x, 0)


relu.defjvp(lambda primals, tangents: (relu(*primals), *tangents))


class Odd(nn.Module):
    """One convolution, each time with something that a layer cannot do."""

    what: str

    @nn.compact
    def __call__(self, x, train):
        settings = {"axis": {"axis": 1}, "scale": {"use_scale": False}, "slash": {"name": "n/m"}}
        dtype = jnp.bfloat16 if self.what == "narrow" else None
        norm = nn.BatchNorm(not train, dtype=dtype, **settings.get(self.what, {}))
        conv = nn.Conv(
            3,
            3 if self.what == "axes" else (3, 3),
            use_bias=self.what == "bias",
            dtype=jnp.float32 if self.what == "dtype" else dtype,
            padding=1,
            input_dilation=2 if self.what == "dilation" else 1,
            name="conv",
        )
        if self.what == "weights":
            conv = nn.WeightNorm(conv, variable_filter={"kernel"})
        y = norm(x)
        y = {
            "straight": straight_through,
            "namesake": relu,
            "relu6": nn.relu6,
            "gelu": nn.gelu,
            "nothing": lambda y: y,
        }.get(self.what, nn.relu)(y)
        if self.what == "key":
            y = nn.Dropout(0.5)(y, deterministic=not train, rng=jax.random.key(0))
        if self.what == "pool":
            y = nn.max_pool(y, (2, 2))
        if self.what == "sown":
            self.sow("intermediates", "activations", y)
        z = conv(y)
        if self.what == "shared":
            z = z + y
        if self.what == "twice":
            z = conv(nn.relu(norm(z)))
        if self.what == "read":
            z = z * norm.variables["params"]["scale"].sum()
        return z


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("bias", "conv: it has a bias; make it with use_bias=False"),
        ("dtype", "conv: its batch norm has another dtype"),
        ("dilation", "conv: input_dilation is set"),
        ("axis", "conv: its batch norm has another axis than the last"),
        ("scale", "conv: its batch norm has another axis than the last, or no scale"),
        ("relu6", "conv: its input is not the ReLU of a batch norm"),
        ("straight", "conv: its input is not the ReLU of a batch norm"),
        ("namesake", "conv: its input is not the ReLU of a batch norm"),
        ("gelu", "conv: its input is not the ReLU of a batch norm"),
        ("nothing", "conv: its input is not the ReLU of a batch norm"),
        ("key", "conv: its input is not the ReLU of a batch norm"),
        ("pool", "conv: its input is not the ReLU of a batch norm"),
        ("shared", "conv: the output of BatchNorm_0 is read elsewhere, too"),
        ("sown", "conv: the output of BatchNorm_0 is read elsewhere, too"),
        ("slash", "conv: rename it or its batch norm: no name on their paths may contain '/'"),
        ("axes", "conv: its input has 4 axes; a layer takes"),
        ("weights", "conv: its parameters, or its batch norm's, are computed from others"),
        ("twice", "conv: it, or its batch norm, is called more than once"),
    ],
)
def test_what_no_layer_computes_is_left_and_said(what, reason):
    model = Odd(what)
    variables = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), X)
    with pytest.raises(ConfigError, match="no layer of the network can become selective") as caught:
        selectivize_model(model, variables, X)
    assert reason in str(caught.value)


def test_input_of_a_wider_type_than_the_computation_is_left():
    model = Odd("narrow")

    def convert(x):
        variables = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), x)
        variables = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), variables)
        return selectivize_model(model, variables, x).converted

    with jax.numpy_dtype_promotion("standard"):
        assert convert(X.astype(jnp.bfloat16)) == {"conv": "BatchNorm_0"}
        with pytest.raises(ConfigError, match="normalizes in the float32 of its input; a layer would in bf"):
            convert(X)


def test_network_that_does_not_run_converted_is_refused():
    model = Odd("read")
    with pytest.raises(ConfigError, match=r"does not run with selective layers, .* The error is KeyError"):
        selectivize_model(model, trained(model), X)


def test_other_methods_are_refused_by_name():
    class InParts(nn.Module):
        def setup(self):
            self.norm = nn.BatchNorm()
            self.conv = nn.Conv(4, (3, 3), use_bias=False)

        def features(self, x, train):
            return nn.relu(self.norm(x, not train))

        def __call__(self, x, train):
            return self.conv(self.features(x, train))

    model = InParts()
    result = selectivize_model(model, trained(model), X)
    with pytest.raises(
        AttributeError, match="'features' is a method of the plain network; only its __call__"
    ):
        result.model.apply(result.variables, X, False, method="features")
    with pytest.raises(AttributeError, match='has no attribute "depth"'):
        result.model.depth  # noqa: B018


def test_stacked_layers_are_left_and_said():
    class Body(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            y = nn.relu(nn.BatchNorm(not train)(x))
            return x + nn.Conv(3, (3, 3), use_bias=False)(y), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            axes = {"params": 0, "batch_stats": 0}
            scan = nn.scan(Body, axes, split_rngs={"params": True}, in_axes=nn.broadcast, length=2)
            x, _ = scan()(x, train)
            x = nn.relu(nn.BatchNorm(not train)(x))
            return nn.Conv(3, (3, 3), use_bias=False, name="last")(x)

    model = Stack()
    variables = trained(model)
    result = selectivize_model(model, variables, X)
    assert list(result.converted) == ["last"]
    assert list(result.left.values()) == ["it is in a loop, or under nn.scan or nn.vmap"]
    np.testing.assert_allclose(
        result.model.apply(result.variables, X, train=False),
        model.apply(variables, X, train=False),
        rtol=1e-4,
        atol=1e-5,
    )


def test_mode_by_another_argument():
    class Other(nn.Module):
        @nn.compact
        def __call__(self, x, use_running_average):
            y = nn.relu(nn.BatchNorm()(x, use_running_average))
            return nn.Conv(6, (3, 3), feature_group_count=3, use_bias=False)(y)

    model = Other()
    variables = model.init(jax.random.key(1), X, use_running_average=True)
    result = selectivize_model(model, variables, X, use_running_average=True)
    for frozen in (True, False):
        y, _ = result.model.apply(result.variables, X, use_running_average=frozen, mutable=["batch_stats"])
        expected, _ = model.apply(variables, X, use_running_average=frozen, mutable=["batch_stats"])
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"capacity": 1.5}, r"capacity is 1\.5; it must be a fraction"),
        ({"model": nnx.Linear(3, 4, rngs=nnx.Rngs(0))}, r"a Linear; .*\(Linen\) module\. For NNX modules"),
        ({"x": jnp.ones((1, 8, 8, 4))}, r"does not run as model\.apply\(variables, \*inputs, train=False\)"),
        ({"options": {"depth": 3}}, r"does not run as .*unexpected keyword argument 'depth'"),
        ({"boxed": True}, r"Unbox them with flax\.linen\.meta\.unbox"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_refused(change, message):
    given = {"model": Network(), "x": X, "options": {}, "capacity": 1.0} | change
    variables = trained(Network())
    if "boxed" in change:
        variables["params"]["stem"]["bias"] = nn.Partitioned(jnp.zeros(8), ("model",))
    with pytest.raises(ConfigError, match=message):
        selectivize_model(
            given["model"], variables, given["x"], capacity=given["capacity"], **given["options"]
        )


def test_layers_that_are_selective_already_stay():
    class Mixed(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = SelectiveConv(6, (3, 3), name="ours")(x, train)
            return nn.Conv(4, (1, 1), use_bias=False)(nn.relu(nn.BatchNorm(not train)(x)))

    model = Mixed()
    result = selectivize_model(model, trained(model), X)
    assert sorted(selconv_jax.layer_states(result.variables)) == ["Conv_0", "ours"]
    with pytest.raises(ConfigError, match="Its selective layers need no conversion"):
        selectivize_model(result.model, result.variables, X)
