"""The layers against flax.linen.Conv on relu(bn(x)), in every form its arguments take."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selconv_jax import BatchNormReLUConv, ConfigError, SelectiveConv
from states import perturbed_variables

SIZES = {1: (9,), 2: (7, 6), 3: (4, 5, 3)}
CASES = {
    "1-D": (1, {}),
    "1-D, size as a number": (1, {"kernel_size": 3}),
    "1-D, causal": (1, {"padding": "CAUSAL", "kernel_dilation": 2}),
    "1-D, causal, strides": (1, {"padding": "CAUSAL", "strides": 2}),
    "1-D, circular, even kernel, dilated": (
        1,
        {"padding": "CIRCULAR", "kernel_size": (4,), "kernel_dilation": 2},
    ),
    "1-D, number": (1, {"padding": 2, "strides": (2,)}),
    "1-D, pair": (1, {"padding": [(3, 0)]}),
    "2-D": (2, {}),
    "2-D, no strides": (2, {"strides": None, "kernel_dilation": None}),
    "2-D, strides": (2, {"strides": (2, 1)}),
    "2-D, same lower": (2, {"padding": "SAME_LOWER", "kernel_size": (2, 4)}),
    "2-D, valid, dilated": (2, {"padding": "VALID", "kernel_dilation": (2, 1)}),
    "2-D, circular": (2, {"padding": "CIRCULAR", "strides": 2}),
    "2-D, reflect": (2, {"padding": "REFLECT", "kernel_size": (3, 2)}),
    "2-D, numbers and pairs": (2, {"padding": (1, (0, 2))}),
    "2-D, groups": (2, {"feature_group_count": 2, "padding": "CIRCULAR"}),
    "2-D, 1x1, circular": (2, {"kernel_size": (1, 1), "padding": "CIRCULAR", "strides": 2}),
    "3-D": (3, {"kernel_size": (2, 3, 1)}),
    "3-D, strides, reflect": (3, {"padding": "REFLECT", "strides": (1, 2, 1)}),
    "3-D, valid": (3, {"padding": "VALID", "kernel_size": (2, 2, 2)}),
}


NARROW = ("1-D, causal", "2-D, strides", "2-D, groups", "3-D")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, jnp.float32) for name in CASES] + [(name, jnp.bfloat16) for name in NARROW],
    ids=[*CASES, *(f"{name}, bfloat16" for name in NARROW)],
)
def test_equals_conv_after_batch_norm_and_relu(name, dtype):
    rank, options = CASES[name]
    options = {"kernel_size": (3,) * rank, **options}
    x = jax.random.normal(jax.random.key(0), (2, *SIZES[rank], 4), dtype)
    layer = BatchNormReLUConv(6, **options, dtype=dtype)
    variables = perturbed_variables(layer, x.shape, seed=1)
    params, stats = variables["params"], variables["batch_stats"]
    norm = nn.BatchNorm(use_running_average=True, dtype=jnp.float32)
    active = norm.apply(
        {"params": {key: params[key] for key in ("scale", "bias")}, "batch_stats": stats},
        x.astype(jnp.float32),
    )
    conv = nn.Conv(6, **options, use_bias=False, dtype=dtype)
    expected = conv.apply({"params": {"kernel": params["kernel"]}}, nn.relu(active).astype(dtype))
    actual = layer.apply(variables, x, train=False)
    assert actual.dtype == expected.dtype == dtype
    assert actual.shape == expected.shape
    # Where the batch norms round apart, a bfloat16 activation differs in its last bit.
    rtol, atol = (1e-5, 1e-5) if dtype == jnp.float32 else (2e-2, 0.1)
    wide = [array.astype(jnp.float32) for array in (actual, expected)]
    np.testing.assert_allclose(*wide, rtol=rtol, atol=atol)

    selective = SelectiveConv(6, **options, dtype=dtype)
    twin = {
        "params": {**params, "shift": jnp.zeros((4, rank))},
        "batch_stats": stats,
        "selectivity": {"gate": jnp.ones(4, bool), "source": jnp.full(4, -1)},
    }
    np.testing.assert_array_equal(selective.apply(twin, x, train=False), actual)


@pytest.mark.parametrize("padding", ["CIRCULAR", "REFLECT", "CAUSAL"])
def test_gradients_of_padded_inputs(padding):
    """The kernel's gradient has a form of its own on CPU."""
    x = jax.random.normal(jax.random.key(0), (2, 8, 3))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 2))
    stats = {"mean": jnp.zeros(3), "var": jnp.ones(3)}
    norm = {"scale": jnp.ones(3), "bias": jnp.ones(3)}

    def ours(kernel, x):
        variables = {"params": {"kernel": kernel, **norm}, "batch_stats": stats}
        return jnp.sum(
            jnp.square(BatchNormReLUConv(2, (3,), padding=padding).apply(variables, x, train=False))
        )

    def theirs(kernel, x):
        active = nn.relu(x / jnp.sqrt(jnp.float32(1 + 1e-5)) + 1)
        conv = nn.Conv(2, (3,), padding=padding, use_bias=False)
        return jnp.sum(jnp.square(conv.apply({"params": {"kernel": kernel}}, active)))

    for actual, expected in zip(
        jax.grad(ours, (0, 1))(kernel, x), jax.grad(theirs, (0, 1))(kernel, x), strict=True
    ):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_number_as_kernel_size_is_for_one_dimension():
    with pytest.raises(ValueError, match=r"kernel_size \(3,\) needs 3 dimensions"):
        BatchNormReLUConv(4, 3).init(jax.random.key(0), jnp.ones((1, 8, 8, 4)), train=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"padding": "CAUSAL"}, "'CAUSAL', which is for one spatial dimension; the kernel has 2"),
        ({"padding": "CIRCLE"}, "padding is 'CIRCLE'. Did you mean 'CIRCULAR'"),
    ],
)
def test_refused_paddings(arguments, message):
    with pytest.raises(ConfigError, match=message):
        BatchNormReLUConv(4, (3, 3), **arguments).init(jax.random.key(0), jnp.ones((1, 8, 8, 4)), train=False)


@pytest.mark.parametrize("kernel_size", [0, (3, 0)])
def test_refused_kernel_sizes(kernel_size):
    with pytest.raises(ConfigError, match=r"kernel_size is .*; it must be a positive integer"):
        BatchNormReLUConv(4, kernel_size)


@pytest.mark.parametrize("layer", [BatchNormReLUConv, SelectiveConv])
def test_what_conv_has_in_another_order_is_given_by_name(layer):
    assert layer(6, (3, 3), (2, 2), "VALID") == layer(6, (3, 3), strides=(2, 2), padding="VALID")
    for input_dilation in (2, (2, 2), [2, 2]):
        with pytest.raises(ConfigError, match="by name, such as kernel_dilation=2"):
            layer(6, (3, 3), 1, "SAME", input_dilation)
