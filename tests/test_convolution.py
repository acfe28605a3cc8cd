"""The convolution against the compiler's own, value and gradients, in every form its arguments take."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from selconv_jax._xla import convolution
from selconv_jax._xla.convolution import canonical_padding, convolve

CASES = {
    "1x1": ((5, 6), (1, 1), 4, {}),
    "1x1, strides 2": ((5, 6), (1, 1), 4, {"strides": (2, 2)}),
    "1x1, padded": ((5, 6), (1, 1), 4, {"padding": ((1, 1), (0, 2))}),
    "3x3, fewer outputs": ((6, 7), (3, 3), 2, {}),
    "3x3, more outputs": ((6, 7), (3, 3), 9, {}),
    "3x3, valid": ((6, 7), (3, 3), 2, {"padding": "VALID"}),
    "3x2, uneven padding": ((6, 7), (3, 2), 2, {"padding": ((0, 2), (1, 3))}),
    "3x3, much padding": ((4, 4), (3, 3), 9, {"padding": ((4, 3), (3, 5))}),
    "3x3, much padding, fewer outputs": ((4, 4), (3, 3), 2, {"padding": ((4, 3), (3, 5))}),
    "3x3, strides": ((6, 7), (3, 3), 4, {"strides": (2, 1), "padding": ((1, 1), (1, 1))}),
    "3x3, dilated": ((8, 8), (3, 3), 4, {"kernel_dilation": (2, 1)}),
    "3x3, groups": ((6, 7), (3, 3), 4, {"groups": 2}),
    "3x3, groups of 8": ((6, 7), (3, 3), 6, {"groups": 2, "channels": 16}),
    "3x3, groups of 8, strides": ((6, 7), (3, 3), 6, {"groups": 2, "channels": 16, "strides": (2, 2)}),
    "1-D": ((9,), (4,), 2, {}),
    "3-D": ((4, 5, 3), (3, 1, 2), 9, {}),
}


@pytest.mark.parametrize("by_products", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients(name, by_products, monkeypatch):
    monkeypatch.setattr(convolution, "products_are_faster", lambda shape: by_products)
    size, taps, features, options = CASES[name]
    rank, groups, channels = len(size), options.get("groups", 1), options.get("channels", 4)
    options = {
        "strides": (1,) * rank,
        "padding": "SAME",
        "kernel_dilation": (1,) * rank,
        "groups": 1,
        **{key: value for key, value in options.items() if key != "channels"},
    }
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (3, *size, channels))
    kernel = jax.random.normal(keys[1], (*taps, channels // groups, features))

    def reference(x, kernel):
        spatial = "DHW"[-rank:]
        return lax.conv_general_dilated(
            x,
            kernel,
            options["strides"],
            options["padding"],
            rhs_dilation=options["kernel_dilation"],
            dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
            feature_group_count=groups,
        )

    expected, transpose = jax.vjp(reference, x, kernel)
    actual, our_transpose = jax.vjp(lambda x, kernel: convolve(x, kernel, **options), x, kernel)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    cotangent = jax.random.normal(keys[2], expected.shape)
    for ours, theirs in zip(our_transpose(cotangent), transpose(cotangent), strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("padding", "expected"),
    [
        ("SAME", "SAME"),
        (2, ((2, 2), (2, 2))),
        ((1, 3), ((1, 1), (3, 3))),
        (((0, 1), 2), ((0, 1), (2, 2))),
    ],
)
def test_forms_of_padding(padding, expected):
    assert canonical_padding(padding, 2) == expected


@pytest.mark.parametrize("channels", [4, 16])
def test_groups_without_spatial_dimensions(channels):
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (3, channels))
    kernel = jax.random.normal(keys[1], (channels // 2, 6))
    y = convolve(x, kernel, strides=(), padding="SAME", kernel_dilation=(), groups=2)
    parts = zip(jnp.split(x, 2, axis=-1), jnp.split(kernel, 2, axis=-1), strict=True)
    expected = jnp.concatenate([part @ rows for part, rows in parts], axis=-1)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_sums_over_many_rows_are_right_under_jit():
    """A released version of jaxlib computed such sums wrongly (jax issue 39103); it is excluded."""
    x = jnp.ones((32_769, 3))
    assert jax.jit(lambda x: x.sum(axis=0))(x).tolist() == [32_769.0] * 3
    values = jax.random.normal(jax.random.key(0), (32_769, 3))
    np.testing.assert_allclose(
        jax.jit(lambda x: x.sum(axis=0))(values), np.sum(np.asarray(values, np.float64), axis=0), rtol=1e-3
    )


def test_trains_on_a_mesh_of_explicit_axes():
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
    x = jax.random.normal(jax.random.key(0), (4, 6, 6, 3))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, 2))

    def loss(kernel, x):
        options = {"strides": (1, 1), "padding": "SAME", "kernel_dilation": (1, 1)}
        return jnp.sum(jnp.square(convolve(x, kernel, **options)))

    expected = jax.grad(loss)(kernel, x)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("batch")))
        actual = jax.jit(jax.grad(loss))(
            jax.device_put(kernel, NamedSharding(mesh, PartitionSpec())), sharded
        )
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("by_products", [False, True])
@pytest.mark.parametrize("features", [2, 4])
def test_convolutions_of_several_taps_have_a_forward_mode(features, by_products, monkeypatch):
    monkeypatch.setattr(convolution, "products_are_faster", lambda shape: by_products)
    x = jax.random.normal(jax.random.key(0), (2, 5, 5, 3))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, features))
    apply = functools.partial(convolve, strides=(1, 1), padding="SAME", kernel_dilation=(1, 1))
    y = apply(x, kernel)
    # Linear in each argument, so it is its own tangent.
    for tangent in (
        jax.jvp(lambda x: apply(x, kernel), (x,), (x,))[1],
        jax.jvp(lambda kernel: apply(x, kernel), (kernel,), (kernel,))[1],
        jax.jvp(apply, (x, kernel), (x, kernel))[1] / 2,
    ):
        np.testing.assert_allclose(tangent, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("features", [2, 4])
def test_second_derivatives_of_products_are_those_of_the_convolution(features, monkeypatch):
    x = jax.random.normal(jax.random.key(0), (2, 5, 5, 3))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, features))
    apply = functools.partial(convolve, strides=(1, 1), padding="SAME", kernel_dilation=(1, 1))

    def product(x, kernel):
        gradients = jax.grad(lambda *at: jnp.sum(apply(*at) ** 3), argnums=(0, 1))
        return jax.grad(lambda *at: sum(map(jnp.sum, gradients(*at))), argnums=(0, 1))(x, kernel)

    results = []
    for by_products in (False, True):
        monkeypatch.setattr(convolution, "products_are_faster", lambda shape, which=by_products: which)
        results.append(product(x, kernel))
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-2)


def test_no_gradient_of_an_input_that_has_none():
    """The tangent of a constant input is not convolved."""
    x, kernel = jnp.ones((1, 4, 4, 24)), jnp.ones((3, 3, 24, 4))
    apply = functools.partial(convolve, strides=(1, 1), padding="SAME", kernel_dilation=(1, 1))
    text = str(jax.make_jaxpr(jax.grad(lambda kernel: jnp.sum(apply(x, kernel))))(kernel))
    assert text.count("conv_general_dilated[") == 1
