"""What re-allocation refuses: wrong arguments, and variables without whole selective layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import selconv_jax
from selconv_jax import AllocationRule, BatchNormReLUConv, ConfigError, SelectiveConv
from selconv_jax.models import DenseNet
from states import perturbed_variables


@pytest.fixture(scope="module")
def variables():
    return perturbed_variables(DenseNet(10, blocks=(1,), growth=4), (2, 8, 8, 3), seed=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold": -0.1}, r"threshold is -0.1; it must be in \[0, 1\]"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"max_copies": -2}, "max_copies is -2"),
        ({"shift_range": -1.0}, "shift_range is -1.0"),
        ({"shift_range": float("inf")}, "shift_range is inf"),
        ({"top_k": 2.5}, "top_k is 2.5; it must be a whole number"),
        ({"max_copies": 1.5}, "max_copies is 1.5; it must be a whole number"),
        ({"threshold": "small"}, "threshold is 'small'"),
        ({"threshold": np.array([0.1, 0.2])}, "threshold is"),
    ],
)
def test_allocation_out_of_bounds(change, message):
    with pytest.raises(ConfigError, match=message):
        AllocationRule(**change)


def test_arguments_of_other_types(variables):
    key = jax.random.key(0)
    with pytest.raises(ConfigError, match=r"rule is a float; .*AllocationRule\(threshold="):
        selconv_jax.reallocate(variables, key, 0.1)
    with pytest.raises(ConfigError, match=r"rule is a type; it must be an AllocationRule"):
        selconv_jax.reallocate(variables, key, AllocationRule)
    with pytest.raises(ConfigError, match=r"rule\('block1_layer1/conv1'\) is a float; it must be an Alloc"):
        selconv_jax.reallocate(variables, key, lambda path: 0.1)
    with pytest.raises(
        ConfigError, match=r"rule returns None for each of the .* 'block1_layer1/conv1': none"
    ):
        selconv_jax.reallocate(variables, key, {"blok1_layer1/conv1": AllocationRule()}.get)
    with pytest.raises(ConfigError, match=r"key is a int; it must be a PRNG key"):
        selconv_jax.reallocate(variables, 0)
    with pytest.raises(
        ConfigError, match=r"key is an array of shape \(\) and dtype int32; it must be a PRNG"
    ):
        selconv_jax.reallocate(variables, jnp.array(3))
    with pytest.raises(ConfigError, match=r"key is an array of shape \(2,\) and dtype key"):
        selconv_jax.reallocate(variables, jax.random.split(key))
    with pytest.raises(ConfigError, match=r"variables is a SelectiveConv; .* nested dictionary"):
        selconv_jax.reallocate(selconv_jax.SelectiveConv(4, (1, 1)), key)


def test_shapes_and_traced_sources_are_refused(variables):
    shapes = jax.eval_shape(lambda: variables)
    with pytest.raises(ConfigError, match="the variables are shapes; pass their values"):
        selconv_jax.reallocate(shapes, jax.random.key(0))
    with pytest.raises(ConfigError, match="sources are traced or shapes, but their values decide"):
        selconv_jax.required_capacity(shapes)
    with pytest.raises(ConfigError, match=r"Call this outside of jax\.jit"):
        jax.jit(lambda variables: selconv_jax.with_capacity(DenseNet(10), variables) and 0)(variables)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("gate", jnp.ones(4, jnp.uint8), "gate has dtype uint8; it must be bool"),
        ("gate", jnp.ones(4, jnp.float32), "gate has dtype float32; it must be bool"),
        ("source", -jnp.ones(4), "source has dtype float32; it must be integer"),
    ],
)
def test_allocations_of_other_types(field, value, message):
    """An integer 1 would close its channel: the complement of 1 is not 0."""
    layer, x = SelectiveConv(2, (1, 1)), jnp.ones((1, 3, 3, 4))
    variables = layer.init(jax.random.key(0), x, train=False)
    changed = {**variables, "selectivity": {**variables["selectivity"], field: value}}
    with pytest.raises(ValueError, match=message):
        layer.apply(changed, x, train=False)
    with pytest.raises(ValueError, match=message):
        selconv_jax.reallocate(changed, jax.random.key(0))


def test_keys_that_are_no_strings():
    layer = SelectiveConv(2, (1, 1)).init(jax.random.key(0), jnp.ones((1, 3, 3, 4)), train=False)
    listed = {collection: {"layers": {0: values}} for collection, values in layer.items()}
    with pytest.raises(ValueError, match=r"\('layers', 0\): keys of variables must be strings"):
        selconv_jax.reallocate(listed, jax.random.key(0))


def test_no_selective_layer():
    layer = BatchNormReLUConv(features=4, kernel_size=(1, 1))
    variables = layer.init(jax.random.key(0), jnp.ones((1, 8, 8, 16)), train=False)
    with pytest.raises(ValueError, match="no selective layer found: looked for 'gate'"):
        selconv_jax.reallocate(variables, jax.random.key(0))


def test_missing_collection(variables):
    part = {key: value for key, value in variables.items() if key != "batch_stats"}
    with pytest.raises(ValueError, match=r"variables\['batch_stats'\] has no 'mean'"):
        selconv_jax.reallocate(part, jax.random.key(0))


def test_what_is_no_layer_is_refused_by_name():
    x = jnp.ones((1, 8, 8, 16))
    plain = SelectiveConv(16, (3, 3)).init(jax.random.key(0), x, train=False)
    kernel = plain["params"]["kernel"]
    wrong = {**plain, "params": {**plain["params"], "kernel": kernel[:, :, :3]}}
    with pytest.raises(ValueError, match=r"layer '': kernel has shape \(3, 3, 3, 16\) for 16 input channels"):
        selconv_jax.reallocate(wrong, jax.random.key(0))
    wrong = {**plain, "batch_stats": {**plain["batch_stats"], "mean": jnp.zeros(8)}}
    with pytest.raises(ValueError, match=r"mean has shape \(8,\), expected \(16,\)"):
        selconv_jax.reallocate(wrong, jax.random.key(0))
    wrong = {**plain, "params": {**plain["params"], "kernel": "kernel"}}
    with pytest.raises(ValueError, match="kernel is a str, expected an array"):
        selconv_jax.reallocate(wrong, jax.random.key(0))
    named = {collection: {"a/b": leaves} for collection, leaves in plain.items()}
    with pytest.raises(ValueError, match="must not contain '/'"):
        selconv_jax.reallocate(named, jax.random.key(0))
