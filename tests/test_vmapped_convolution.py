"""Convolutions under `jax.vmap` over networks: one dense convolution for each, with the same numbers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selconv_jax._xla import convolution
from selconv_jax._xla.convolution import convolve
from selconv_jax._xla.vmapped_convolution import unrolled_convolutions

MEMBERS = 3
CASES = {
    "3x3": ((2, 6, 5, 4), (3, 3, 4, 2), {"strides": (1, 1), "padding": "SAME", "kernel_dilation": (1, 1)}),
    "strided": (
        (2, 7, 6, 4),
        (3, 2, 4, 2),
        {"strides": (2, 1), "padding": ((1, 0), (2, 1)), "kernel_dilation": (1, 2)},
    ),
    "1-D, groups": (
        (2, 9, 4),
        (3, 2, 6),
        {"strides": (1,), "padding": "CIRCULAR", "kernel_dilation": (2,), "groups": 2},
    ),
    "1x1": ((2, 4, 4, 4), (1, 1, 4, 2), {"strides": (2, 2), "padding": "VALID", "kernel_dilation": (1, 1)}),
}


def groups_of(function, *arguments):
    """The group counts of all convolutions."""
    text = str(jax.make_jaxpr(function)(*arguments))
    return re.findall(r"feature_group_count=(\d+)", text), re.findall(r"batch_group_count=(\d+)", text)


def gradients(options):
    """A function with a gradient that depends on both arguments."""

    def loss(x, kernel):
        return jnp.sum(jnp.sin(convolve(x, kernel, **options)))

    return jax.value_and_grad(loss, argnums=(0, 1))


@pytest.mark.parametrize("by_products", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_each_member_as_alone(name, shared, by_products, monkeypatch):
    monkeypatch.setattr(convolution, "products_are_faster", lambda shape: by_products)
    image, kernel_shape, options = CASES[name]
    x = jax.random.normal(jax.random.key(0), image if shared else (MEMBERS, *image))
    kernels = jax.random.normal(jax.random.key(1), (MEMBERS, *kernel_shape))
    one = gradients(options)
    with unrolled_convolutions():
        together = jax.vmap(one, in_axes=(None if shared else 0, 0))
        groups, batch_groups = groups_of(together, x, kernels)
        actual = jax.jit(together)(x, kernels)
    for member in range(MEMBERS):
        expected = one(x if shared else x[member], kernels[member])
        for part, wanted in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(part[member], wanted, rtol=1e-5, atol=1e-5)
    # None is grouped but those that are of one member too.
    alone, alone_batch = groups_of(one, x if shared else x[0], kernels[0])
    assert set(groups) == set(alone)
    assert set(batch_groups) == set(alone_batch)
    assert len(groups) == MEMBERS * len(alone)


def test_a_network_alone_is_another_program_only_where_that_is_asked_for():
    image, kernel_shape, options = CASES["3x3"]
    x, kernel = jnp.ones(image), jnp.ones(kernel_shape)

    def text():
        return str(jax.make_jaxpr(lambda x, kernel: convolve(x, kernel, **options))(x, kernel))

    plain = text()
    with unrolled_convolutions():
        assert "custom_vjp_call" in text()
        np.testing.assert_array_equal(convolve(x, kernel, **options), convolve(x, kernel, **options))
    assert text() == plain
    assert "custom" not in plain
