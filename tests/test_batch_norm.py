"""Batch statistics that are taken once and shared; what does not become finite again."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from selconv_jax import BatchNormReLUConv, SelectiveConv
from selconv_jax._bench.states import with_copies
from selconv_jax._xla.batch_norm import Statistics, batch_norm_relu, batch_statistics, join_statistics
from selconv_jax._xla.platforms import tracing_for


@pytest.fixture(autouse=True)
def _wide():
    with jax.enable_x64(True):
        yield


def _layers():
    plain = BatchNormReLUConv(5, (1, 1), param_dtype=jnp.float64)
    return plain, SelectiveConv(5, (1, 1), param_dtype=jnp.float64)


@pytest.mark.parametrize(
    "shape", [(3, 4), (2, 5, 3), (2, 4, 6, 3), (2, 3, 4, 2, 3), (1, 1, 1, 2), (4, 2, 300)]
)
def test_statistics_of_any_rank(shape):
    x = 100 + jax.random.normal(jax.random.key(0), shape, jnp.float64)
    mean, var = batch_statistics(x)
    axes = tuple(range(len(shape) - 1))
    np.testing.assert_allclose(mean, np.mean(x, axes), rtol=1e-14)
    np.testing.assert_allclose(var, np.var(x, axes), rtol=1e-12, atol=1e-24)


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
def test_the_variance_does_not_cancel_far_from_zero(offset):
    x = np.random.default_rng(0).normal(size=(8, 16, 16, 4)) + offset
    x[:, 0, 0] += 50  # the pixel that differences are taken from is an outlier
    x = x.astype(np.float32)
    expected = np.var(x.astype(np.float64), (0, 1, 2))
    np.testing.assert_allclose(batch_statistics(jnp.asarray(x)).var, expected, rtol=1e-3)


@pytest.mark.parametrize("value", [0.1, 1e30])
def test_the_variance_of_a_constant_channel_is_zero(value):
    assert batch_statistics(jnp.full((4, 8, 8, 1), value, jnp.float32)).var == 0


@pytest.mark.parametrize(("channels", "exchange"), [(2, "all-gather"), (300, "all-reduce")])
def test_devices_exchange_statistics_of_few_channels_at_once(channels, exchange):
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Auto,))
    x = 100 + jax.random.normal(jax.random.key(0), (8, 3, 3, channels), jnp.float64)
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("batch")))
    compiled = jax.jit(batch_statistics).lower(sharded).compile()
    # Sums over the devices are two, one after the other: of the means, then of the variances about them.
    assert {kind for kind in ("all-gather", "all-reduce") if kind in compiled.as_text()} == {exchange}
    chex.assert_trees_all_close(compiled(sharded), batch_statistics(x), rtol=1e-12)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_derivatives_of_first_and_second_order(platform):
    keys = jax.random.split(jax.random.key(1), 3)
    x = jax.random.normal(keys[0], (2, 3, 2, 2), jnp.float64)
    scale, bias = jax.random.normal(keys[1], (2, 2), jnp.float64)

    def ours(x, scale, bias):
        with tracing_for(platform):
            return jnp.sum(jnp.sin(batch_norm_relu(x, *batch_statistics(x), scale, bias, 1e-5)))

    def simple(x, scale, bias):
        axes = (0, 1, 2)
        normal = (x - jnp.mean(x, axes, keepdims=True)) / jnp.sqrt(jnp.var(x, axes, keepdims=True) + 1e-5)
        return jnp.sum(jnp.sin(jax.nn.relu(normal * scale[None, None, None] + bias[None, None, None])))

    arguments = (x, scale, bias)
    for transform in (jax.grad, jax.jacfwd, jax.hessian):
        actual, expected = (transform(f, argnums=(0, 1, 2))(*arguments) for f in (ours, simple))
        chex.assert_trees_all_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("number", range(2))
def test_known_statistics_change_nothing(number):
    layer = _layers()[number]
    parts = [jax.random.normal(jax.random.key(k), (2, 6, 6, 4), jnp.float64) for k in range(2)]
    variables = layer.init(jax.random.key(2), jnp.concatenate(parts, -1), train=False)
    if number:
        variables = with_copies(variables, 0.5, seed=0)

    def run(params, parts, known):
        x = jnp.concatenate(parts, axis=-1)
        statistics = join_statistics(*map(batch_statistics, parts)) if known else None
        y, changed = layer.apply(
            {**variables, "params": params}, x, True, statistics, mutable=["batch_stats"]
        )
        return jnp.sum(jnp.sin(y)), changed

    results = [
        jax.value_and_grad(run, argnums=(0, 1), has_aux=True)(variables["params"], parts, known)
        for known in (False, True)
    ]
    chex.assert_trees_all_close(*results, rtol=1e-9, atol=1e-12)


def test_statistics_of_another_width_are_refused():
    layer = BatchNormReLUConv(2, (1, 1), name="conv", param_dtype=jnp.float64)
    x = jnp.ones((1, 4, 4, 3))
    variables = layer.init(jax.random.key(0), x, train=False)
    wrong = Statistics(jnp.zeros(2), jnp.ones(2))
    with pytest.raises(
        ValueError, match=r"conv: statistics of shapes \(2,\), \(2,\).*\(1, 4, 4, 3\).*\(3,\)"
    ):
        layer.apply(variables, x, True, wrong, mutable=["batch_stats"])


@pytest.mark.parametrize(("value", "train"), list(itertools.product([np.nan, np.inf, 1e30], [True, False])))
def test_what_is_not_finite_is_not_hidden(value, train):
    layer = BatchNormReLUConv(2, (1, 1))
    x = jnp.ones((1, 4, 4, 3), jnp.float32).at[0, 1, 1, 0].set(value)
    variables = layer.init(jax.random.key(0), x, train=False)
    if not train:
        variables["batch_stats"]["var"] = variables["batch_stats"]["var"].at[0].set(value * value)
    y = layer.apply(variables, x, train, mutable=["batch_stats"])[0]
    assert not jnp.isfinite(y).all()
