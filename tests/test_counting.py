"""Multiply-adds against numbers worked out by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from selconv_jax import BatchNormReLUConv
from selconv_jax.analysis._counting import count_multiply_adds, count_parameters
from selconv_jax.models import DenseNet


def counted(layer, *shape):
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    counts = count_multiply_adds(lambda x: layer.init(jax.random.key(0), x, train=False), x)
    return sum(counts.values())


def test_convolutions():
    assert counted(BatchNormReLUConv(8, (3, 3)), 2, 5, 7, 4) == 2 * 5 * 7 * 8 * (9 * 4)
    assert counted(BatchNormReLUConv(8, (3, 3), strides=2), 1, 6, 6, 4) == 3 * 3 * 8 * (9 * 4)
    assert counted(BatchNormReLUConv(8, (3, 3), feature_group_count=2), 1, 6, 6, 4) == 6 * 6 * 8 * (9 * 2)
    assert counted(BatchNormReLUConv(8, (1, 1)), 1, 6, 6, 4) == 6 * 6 * 8 * 4
    assert counted(BatchNormReLUConv(8, (5,)), 3, 6, 4) == 3 * 6 * 8 * (5 * 4)


@pytest.mark.parametrize(("size", "padding"), [(2, "VALID"), (3, "SAME"), (4, "SAME")])
def test_transposed_convolutions(size, padding):
    """Each pixel of the input is multiplied once with every weight, whatever the stride."""
    layer = nn.ConvTranspose(8, (size, size), strides=(2, 2), padding=padding)
    x = jax.ShapeDtypeStruct((2, 5, 7, 4), jnp.float32)
    found = count_multiply_adds(lambda x: layer.init_with_output(jax.random.key(0), x)[0], x)
    assert sum(found.values()) == 2 * 5 * 7 * 4 * (size * size * 8)


def test_gradients_cost_what_the_convolution_does():
    def strided(x, kernel):
        names = ("NHWC", "HWIO", "NHWC")
        options = {"dimension_numbers": names, "rhs_dilation": (1, 2), "feature_group_count": 2}
        return lax.conv_general_dilated(x, kernel, (2, 3), ((1, 1), (2, 2)), **options)

    x, kernel = jnp.ones((2, 6, 9, 4)), jnp.ones((3, 3, 2, 8))
    alone = count_multiply_adds(strided, x, kernel)[""]
    assert alone == 2 * 3 * 3 * 8 * (9 * 2)
    for number in (0, 1):
        gradient = jax.grad(lambda *arguments: strided(*arguments).sum(), argnums=number)
        assert sum(count_multiply_adds(gradient, x, kernel).values()) == 2 * alone


def test_network_by_layer():
    model = DenseNet(10, blocks=(1, 1), growth=2, variant="plain")
    images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    counts = count_multiply_adds(lambda x: model.init(jax.random.key(0), x, train=False), images)
    assert counts == {
        "DenseNet/stem": 64 * 4 * 27,
        "DenseNet/block1_layer1/conv1": 64 * 4 * 8,
        "DenseNet/block1_layer1/conv2": 64 * 72 * 2,
        "DenseNet/block2_layer1/conv1": 16 * 6 * 8,
        "DenseNet/block2_layer1/conv2": 16 * 72 * 2,
        "DenseNet/classifier/linear": 8 * 10,
    }


def test_loops_and_branches():
    square = jnp.ones((4, 4))

    def thrice(x):
        return lax.scan(lambda carry, _: (carry @ square, None), x, length=3)[0]

    assert count_multiply_adds(thrice, square) == {"": 3 * 64}

    def dearer(x):
        return lax.cond(x[0, 0] > 0, lambda x: x @ square @ square, lambda x: x @ square, x)

    assert count_multiply_adds(dearer, square) == {"": 2 * 64}
    assert count_multiply_adds(jax.jit(lambda x: x @ square), square) == {"": 64}


def test_all_devices_count():
    mesh = jax.sharding.Mesh(np.reshape(jax.devices()[:4], (2, 2)), ("rows", "columns"))
    x, kernel = jnp.ones((8, 3)), jnp.ones((3, 5))
    for axes in (("rows", "columns"), ("rows",)):
        rows, whole = jax.P(axes), jax.P()
        options = {"mesh": mesh, "in_specs": (rows, whole), "out_specs": rows, "axis_names": set(axes)}
        assert count_multiply_adds(jax.shard_map(jnp.dot, **options), x, kernel) == {"": 8 * 3 * 5}


def test_parameters_of_shapes():
    shapes = {"kernel": jax.ShapeDtypeStruct((3, 3, 2, 4), jnp.float32), "scale": jnp.ones(2)}
    assert count_parameters(shapes) == 74
