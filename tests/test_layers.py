"""The module's contract: variables, variants, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import ModifyScopeVariableError

from selconv_jax import BatchNormReLUConv, ConfigError, SelectiveConv
from selconv_jax._xla.platforms import tracing_for
from selconv_jax.functional import channel_shift, select
from states import perturbed_variables


def variables_of(layer, shape):
    return jax.eval_shape(lambda: layer.init(jax.random.key(0), jnp.ones(shape), train=True))


def test_variables_of_the_three_kinds():
    shape = (2, 8, 8, 6)
    layers = {
        "selective": SelectiveConv(4, (3, 3)),
        "gate-only": SelectiveConv(4, (3, 3), gate_only=True),
        "plain": BatchNormReLUConv(4, (3, 3)),
    }
    found = {
        name: {collection: sorted(leaves) for collection, leaves in variables_of(layer, shape).items()}
        for name, layer in layers.items()
    }
    stats = ["mean", "var"]
    assert found == {
        "selective": {
            "params": ["bias", "kernel", "scale", "shift"],
            "batch_stats": stats,
            "selectivity": ["gate", "source"],
        },
        "gate-only": {
            "params": ["bias", "kernel", "scale"],
            "batch_stats": stats,
            "selectivity": ["gate"],
        },
        "plain": {"params": ["bias", "kernel", "scale"], "batch_stats": stats},
    }


def test_initial_values():
    layer = SelectiveConv(64, (3, 3))
    variables = layer.init(jax.random.key(0), jnp.ones((1, 4, 4, 96)), train=True)
    params, stats, selectivity = (variables[key] for key in ("params", "batch_stats", "selectivity"))
    assert float(params["kernel"].std()) == pytest.approx(np.sqrt(2 / (9 * 64)), rel=0.02)
    assert float(params["kernel"].mean()) == pytest.approx(0, abs=1e-3)
    for leaf, value in (
        (params["scale"], 1),
        (params["bias"], 0),
        (params["shift"], 0),
        (stats["mean"], 0),
        (stats["var"], 1),
        (selectivity["gate"], True),
        (selectivity["source"], -1),
    ):
        assert (leaf == value).all()
    assert selectivity["gate"].dtype == jnp.bool_
    assert selectivity["source"].dtype == jnp.int32


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("gate_only", [False, True])
def test_untouched_layer_equals_its_plain_twin(gate_only, train):
    x = jax.random.normal(jax.random.key(0), (3, 8, 8, 6))
    layer = SelectiveConv(5, (3, 3), gate_only=gate_only)
    variables = perturbed_variables(layer, x.shape, seed=1)
    plain = {
        "params": {key: variables["params"][key] for key in ("kernel", "scale", "bias")},
        "batch_stats": variables["batch_stats"],
    }
    selective, stats = layer.apply(variables, x, train=train, mutable=["batch_stats"])
    expected, plain_stats = BatchNormReLUConv(5, (3, 3)).apply(plain, x, train=train, mutable=["batch_stats"])
    np.testing.assert_allclose(selective, expected, rtol=1e-5, atol=1e-5)
    for key in ("mean", "var"):
        np.testing.assert_allclose(stats["batch_stats"][key], plain_stats["batch_stats"][key], rtol=1e-6)


def test_initializing_and_evaluating_move_no_statistics():
    layer = SelectiveConv(5, (1, 1))
    x = 7 + jax.random.normal(jax.random.key(0), (3, 8, 8, 6))
    variables = layer.init(jax.random.key(0), x, train=True)
    assert (variables["batch_stats"]["mean"] == 0).all()
    _, changed = layer.apply(variables, x, train=False, mutable=["batch_stats"])
    assert (changed["batch_stats"]["mean"] == 0).all()
    _, changed = layer.apply(variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(changed["batch_stats"]["mean"], 0.1 * x.mean((0, 1, 2)), rtol=1e-5)
    unbiased = x.reshape(-1, 6).var(0, ddof=1)
    np.testing.assert_allclose(changed["batch_stats"]["var"], 0.9 + 0.1 * unbiased, rtol=1e-5)


def test_training_must_be_able_to_move_the_statistics():
    layer, x = SelectiveConv(5, (1, 1)), jnp.ones((2, 4, 4, 6))
    variables = layer.init(jax.random.key(0), x, train=False)
    for mutable in (False, ["selectivity"]):
        with pytest.raises(ModifyScopeVariableError, match='collection "batch_stats" is immutable'):
            layer.apply(variables, x, train=True, mutable=mutable)


@pytest.mark.parametrize("train", [False, True])
def test_a_variance_that_overflows_does_not_go_unnoticed(train):
    layer = SelectiveConv(5, (1, 1))
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 6))
    variables = layer.init(jax.random.key(0), x, train=False)
    if train:
        x = x.at[..., 2].multiply(1e30)
    else:
        variables["batch_stats"]["var"] = jnp.ones(6).at[2].set(jnp.inf)
    assert np.isnan(layer.apply(variables, x, train, mutable=["batch_stats"])[0]).all()


def test_closed_channels_are_not_read():
    layer = SelectiveConv(5, (3, 3), gate_only=True)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 6))
    variables = perturbed_variables(layer, x.shape, seed=1)
    variables["selectivity"]["gate"] = jnp.array([True, False, True, True, False, True])
    changed = x.at[..., 1].add(3.0).at[..., 4].multiply(-2.0)
    apply = jax.jit(lambda x: layer.apply(variables, x, train=False))
    np.testing.assert_array_equal(apply(x), apply(changed))
    is_open = variables["selectivity"]["gate"]
    assert np.abs(apply(x) - apply(jnp.where(is_open, 3.0, x))).max() > 0.1


def test_dropout_needs_and_uses_its_key():
    layer = SelectiveConv(5, (1, 1), dropout_rate=0.5)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 6))
    variables = layer.init(jax.random.key(0), x, train=False)

    def output(seed, **modes):
        rngs = {"dropout": jax.random.key(seed)}
        return layer.apply(variables, x, rngs=rngs, mutable="batch_stats", **modes)[0]

    for modes in ({"train": True}, {"train": False, "deterministic": False}):
        outputs = [output(seed, **modes) for seed in (0, 0, 1)]
        np.testing.assert_array_equal(outputs[0], outputs[1])
        assert np.abs(outputs[0] - outputs[2]).max() > 0
    np.testing.assert_array_equal(*(output(seed, train=True, deterministic=True) for seed in (0, 1)))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_any_number_of_spatial_dimensions(rank):
    x = jax.random.normal(jax.random.key(0), (2, *(6, 5, 4)[:rank], 3))
    layer = SelectiveConv(4, (3,) * rank)
    variables = layer.init(jax.random.key(0), x, train=False)
    variables["selectivity"]["source"] = jnp.array([2, -1, 2])
    variables["params"]["shift"] = jnp.full((3, rank), 0.5)
    assert variables["params"]["shift"].shape == (3, rank)
    assert layer.apply(variables, x, train=False).shape == (*x.shape[:-1], 4)


def test_grouped_gate_closes_the_right_rows():
    x = jax.random.normal(jax.random.key(0), (2, 5, 5, 6))
    layer = SelectiveConv(4, (3, 3), feature_group_count=2, gate_only=True)
    variables = layer.init(jax.random.key(0), x, train=False)
    variables["selectivity"]["gate"] = jnp.array([True, True, True, True, False, True])
    closed = layer.apply(variables, x, train=False)
    variables["selectivity"]["gate"] = jnp.ones(6, bool)
    kernel = variables["params"]["kernel"]  # [3, 3, 3, 4]: channel 4 is row 1 of outputs 2 and 3
    variables["params"]["kernel"] = kernel.at[:, :, 1, 2:].set(0)
    np.testing.assert_allclose(closed, layer.apply(variables, x, train=False), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features": 0}, "features is 0"),
        ({"feature_group_count": 0}, "feature_group_count is 0"),
        ({"feature_group_count": 3}, "features is 4, not a multiple of feature_group_count 3"),
        ({"dropout_rate": 1.0}, r"dropout_rate is 1.0; it must be in \[0, 1\)"),
        ({"momentum": 1.5}, "momentum is 1.5"),
        ({"capacity": 1.5}, "capacity is 1.5"),
        ({"capacity": "all"}, "capacity is 'all'"),
        ({"features": 4.0}, "features is 4.0; it must be a whole number"),
        ({"epsilon": -1.0}, "epsilon is -1.0"),
        ({"kernel_size": (3.7, 3)}, r"kernel_size is \(3.7, 3\)"),
        ({"kernel_size": 0}, "kernel_size is"),
        ({"strides": (1.5, 2)}, r"strides is \(1.5, 2\)"),
        ({"strides": (1, 2, 3)}, "strides is"),
        ({"strides": 0}, "strides is 0"),
        ({"padding": "SMAE"}, "padding is 'SMAE'"),
        ({"padding": (1, 2, 3)}, "padding is"),
        ({"padding": 1.5}, "padding is 1.5"),
        ({"padding": ((1, 2.5), 1)}, "padding is"),
        ({"kernel_dilation": (0, 1)}, "kernel_dilation is"),
    ],
)
def test_out_of_bounds(arguments, message):
    with pytest.raises(ConfigError, match=message):
        SelectiveConv(**{"features": 4, "kernel_size": (3, 3), **arguments})


def test_wrong_rank_and_groups_of_the_input():
    with pytest.raises(ValueError, match=r"input of shape \(1, 8, 4\).*needs 4 dimensions"):
        SelectiveConv(4, (3, 3)).init(jax.random.key(0), jnp.ones((1, 8, 4)), train=False)
    with pytest.raises(ValueError, match="5 input channels do not divide into 2 groups"):
        SelectiveConv(4, (3, 3), feature_group_count=2).init(
            jax.random.key(0), jnp.ones((1, 8, 8, 5)), train=False
        )


def test_numbers_of_numpy_are_numbers():
    x = jnp.ones((2, 9, 3))
    arguments = {"strides": np.int64(2), "padding": np.int64(1), "kernel_dilation": np.int64(1)}
    y, _ = BatchNormReLUConv(4, np.int64(3), **arguments).init_with_output(jax.random.key(0), x, train=False)
    assert y.shape == (2, 5, 4)


@pytest.mark.parametrize(("gate_only", "names"), [(True, ["gate"]), (False, ["gate", "source"])])
def test_variables_of_a_gate_only_layer(gate_only, names):
    collections = variables_of(SelectiveConv(4, (3, 3), gate_only=gate_only), (1, 8, 8, 6))
    assert sorted(collections["selectivity"]) == names
    assert ("shift" in collections["params"]) == (not gate_only)


def crowded(copies, channels=8):
    """A layer, its variables with so many copies, and an input."""
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, channels))
    variables = perturbed_variables(SelectiveConv(4, (3, 3)), x.shape, seed=1)
    source = jnp.where(jnp.arange(channels) % 2 == 0, jnp.arange(channels)[::-1], -1)
    kept = jnp.cumsum(source >= 0) <= copies
    variables["selectivity"]["source"] = jnp.where(kept, source, -1)
    return SelectiveConv(4, (3, 3)), variables, x


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("train", [False, True])
def test_more_copies_than_slots_are_never_another_number(platform, train):
    layer, variables, x = crowded(copies=3)

    def apply(capacity):
        with tracing_for(platform):
            of = layer.clone(capacity=capacity)
            return jax.jit(lambda v: of.apply(v, x, train, mutable=["batch_stats"])[0])(variables)

    expected = apply(1.0)
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(apply(3 / 8), expected)
    for capacity in (2 / 8, 0.0):
        assert np.isnan(apply(capacity)).all()


def test_more_copies_than_slots_under_vmap_and_scan():
    layer, full, x = crowded(copies=3)
    _, fits, _ = crowded(copies=1)
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), fits, full)
    for capacity in (0.0, 2 / 8):
        few = layer.clone(capacity=capacity)
        mapped = jax.vmap(lambda v, few=few: few.apply(v, x, False))(stack)
        _, scanned = jax.lax.scan(lambda _, v, few=few: (None, few.apply(v, x, False)), None, stack)
        for y in (mapped, scanned):
            assert np.isnan(y[1]).all()
            if capacity:
                np.testing.assert_allclose(y[0], layer.apply(fits, x, False), rtol=1e-5, atol=1e-5)


def test_known_copies_without_slots_are_an_error():
    layer, variables, x = crowded(copies=3)
    with pytest.raises(ConfigError, match=r"capacity is 0\.25, which provides for 2 copies, but 3 of its 8"):
        layer.clone(capacity=0.25).apply(variables, x, train=False)


@pytest.mark.parametrize("capacity", [0, 1])
def test_select_beyond_its_bound_is_nan(capacity):
    x = jnp.ones((1, 3, 4))
    source, shift = jnp.array([-1, 0, 0, -1]), jnp.zeros((4, 1))
    np.testing.assert_array_equal(np.isnan(select(x, source, shift, capacity)).all((0, 1)), source >= 0)
    np.testing.assert_array_equal(select(x, source, shift, 2), x)


def test_a_shift_that_is_not_a_number_makes_none():
    x = jnp.ones((1, 3, 2))
    np.testing.assert_array_equal(
        np.isnan(channel_shift(x, jnp.array([[jnp.nan], [jnp.inf]]))).all((0, 1)), [True, False]
    )


@pytest.mark.parametrize("size", [(1, 1), (3, 3)])
def test_an_empty_batch_stays_empty(size):
    layer, x = SelectiveConv(4, size), jnp.ones((2, 6, 6, 8))
    variables = layer.init(jax.random.key(0), x, train=False)
    assert layer.apply(variables, x[:0], train=False).shape == (0, 6, 6, 4)
