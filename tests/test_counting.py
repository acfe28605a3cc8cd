"""Multiply-adds against numbers worked out by hand."""

import jax
import jax.numpy as jnp
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


def test_parameters_of_shapes():
    shapes = {"kernel": jax.ShapeDtypeStruct((3, 3, 2, 4), jnp.float32), "scale": jnp.ones(2)}
    assert count_parameters(shapes) == 74
