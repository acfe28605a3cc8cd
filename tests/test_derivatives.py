"""Derivatives of layers in every mode JAX has, in every formulation, and under shard_map with its checks."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import selconv_jax
from selconv_jax import BatchNormReLUConv, SelectiveConv
from selconv_jax._xla.platforms import tracing_for
from selconv_jax.compaction._places import take_channels, take_repeated
from selconv_jax.nn._computation import window_of
from states import perturbed_variables

LAYERS = {
    "plain 1x1": BatchNormReLUConv(4, (1, 1)),
    "1x1": SelectiveConv(4, (1, 1), capacity=0.75),
    "3x3": BatchNormReLUConv(24, (3, 3)),
    "3x3, groups": SelectiveConv(16, (3, 3), feature_group_count=2),
    "1-D, strides": SelectiveConv(4, (3,), strides=2, padding="CIRCULAR", capacity=0.75),
}
CHANNELS = 16


def case(name, batch=2):
    """A layer, its variables with copies and closed channels, and an input."""
    layer = LAYERS[name]
    x = jax.random.normal(jax.random.key(0), (batch, *(5,) * len(window_of(layer)), CHANNELS))
    given = {"closed": 0.2, "copies": 0.5} if isinstance(layer, SelectiveConv) else {}
    return layer, perturbed_variables(layer, x.shape, seed=1, **given), x


def loss_of(layer, variables, train):
    """A smooth number of parameters and input."""

    def loss(params, x):
        y, _ = layer.apply({**variables, "params": params}, x, train, mutable=["batch_stats"])
        return jnp.mean(jnp.sin(y))

    return loss


def directions(tree, seed):
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(
        structure, [jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    )


def along(gradient, direction):
    return sum(map(jnp.vdot, jax.tree.leaves(gradient), jax.tree.leaves(direction)))


def assert_modes_agree(loss, *at):
    """Forward, reverse, and both ways of second derivatives along a direction."""
    way = directions(at, 3)
    gradient = jax.grad(loss, argnums=tuple(range(len(at))))

    @jax.jit
    def derivatives(at, way):
        _, linear = jax.linearize(loss, *at)
        first = (
            along(gradient(*at), way),
            jax.jvp(loss, at, way)[1],
            linear(*way),
        )
        second = (
            jax.grad(lambda at: along(gradient(*at), way))(at),
            jax.jvp(lambda *at: gradient(*at), at, way)[1],
            jax.grad(lambda at: jax.jvp(loss, at, way)[1])(at),
        )
        return first, second

    first, second = derivatives(at, way)
    assert abs(first[0]) > 1e-3
    np.testing.assert_allclose(first[1:], first[0], rtol=2e-4, atol=1e-6)
    vectors = [ravel_pytree(each)[0] for each in second]
    for other in vectors[1:]:
        np.testing.assert_allclose(other, vectors[0], rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_all_modes_agree(name, train, platform):
    layer, variables, x = case(name)
    with tracing_for(platform):
        assert_modes_agree(loss_of(layer, variables, train), variables["params"], x)


@pytest.mark.usefixtures("device_count")
@pytest.mark.parametrize("name", ["1x1", "1-D, strides"])
def test_all_modes_agree_on_any_number_of_devices(name):
    layer, variables, x = case(name)
    assert_modes_agree(loss_of(layer, variables, True), variables["params"], x)


def test_all_modes_agree_in_a_compact_layer():
    layer, variables, x = case("1x1")
    small, small_variables = selconv_jax.compact(layer, variables, x)
    assert "selectivity" not in small_variables
    assert_modes_agree(loss_of(small, small_variables, False), small_variables["params"], x)


def test_hessian_of_a_layer():
    layer = SelectiveConv(2, (1,), capacity=0.5)
    x = jax.random.normal(jax.random.key(0), (2, 3, 4))
    variables = perturbed_variables(layer, x.shape, seed=0)
    variables["selectivity"]["source"] = jnp.array([-1, 0, -1, 2])
    flat, unravel = ravel_pytree(variables["params"])

    def loss(flat):
        return loss_of(layer, variables, False)(unravel(flat), x)

    hessian = jax.jit(jax.hessian(loss))(flat)
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-6)
    np.testing.assert_allclose(hessian, jax.jit(jax.jacrev(jax.grad(loss)))(flat), atol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.jacfwd(loss))(flat), jax.grad(loss)(flat), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4)])
@pytest.mark.parametrize("take", [take_channels, take_repeated])
def test_constant_gathers_in_both_modes(take, shape):
    x = jax.random.normal(jax.random.key(0), shape)
    index = (3, 0) if take is take_channels else (3, 3, 0)
    forward, reverse = (mode(functools.partial(take, index=index))(x) for mode in (jax.jacfwd, jax.jacrev))
    expected = jax.jacrev(lambda x: x[..., jnp.array(index)])(x)
    np.testing.assert_array_equal(forward, expected)
    np.testing.assert_array_equal(reverse, expected)


def gradients_of_two_devices(loss, params, x, kind):
    """Of the mean loss over two devices, each with half of the input, under the default checks."""
    mesh = jax.make_mesh((2,), ("data",), (kind,), devices=jax.devices()[:2])
    whole, split = PartitionSpec(), PartitionSpec("data")

    def gradients(params, x):
        mean = jax.grad(lambda params, x: jax.lax.pmean(loss(params, x), "data"), argnums=(0, 1))
        return mean(params, x)

    sharded = jax.shard_map(gradients, mesh=mesh, in_specs=(whole, split), out_specs=(whole, split))
    return jax.jit(sharded)(
        jax.device_put(params, NamedSharding(mesh, whole)), jax.device_put(x, NamedSharding(mesh, split))
    )


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", [*LAYERS, "compact"])
def test_gradients_under_shard_map_with_its_checks(name, train, kind):
    layer, variables, x = case("1x1" if name == "compact" else name, batch=4)
    if name == "compact":
        layer, variables = selconv_jax.compact(layer, variables, x)
    loss = loss_of(layer, variables, train)
    actual = gradients_of_two_devices(loss, variables["params"], x, kind)
    expected = jax.jit(jax.grad(lambda params, x: (loss(params, x[:2]) + loss(params, x[2:])) / 2, (0, 1)))(
        variables["params"], x
    )
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-6)
