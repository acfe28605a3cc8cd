"""Linen forms of NNX modules that compute, read or transform the variables of their layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from selconv_jax import AllocationRule
from selconv_jax.nnx import SelectiveConv, compact, linen_variables, reallocate, selectivize_module, to_linen

X = jax.random.normal(jax.random.key(0), (2, 6, 6, 8))


class Reading(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(8, 8, (3, 3), rngs=rngs)

    def __call__(self, x):
        return self.conv(x) + jnp.sum(self.conv.kernel[...] ** 2)


class Standardized(Reading):
    def __call__(self, x):
        kernel = self.conv.kernel[...]
        self.conv.kernel[...] = kernel - kernel.mean(axis=(0, 1, 2), keepdims=True)
        y = self.conv(x)
        self.conv.kernel[...] = kernel
        return y


class Tied(Reading):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.second = nnx.Conv(8, 8, (3, 3), rngs=rngs)
        self.second.kernel = self.conv.kernel

    def __call__(self, x):
        return self.second(self.conv(x))


class Remat(nnx.Module):
    def __init__(self, rngs):
        self.conv = SelectiveConv(8, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)

    @nnx.remat
    def __call__(self, x):
        return x + self.norm(self.conv(x))


class Jitted(Remat):
    @nnx.jit
    def __call__(self, x):
        return x + self.norm(self.conv(x))


class Stack(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def make(rngs):
            return SelectiveConv(8, 8, (3, 3), rngs=rngs)

        self.layers = make(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(layer, x):
            return layer(x)

        return run(self.layers, x)


def normalized(rngs):
    return nnx.WeightNorm(nnx.Conv(8, 8, (3, 3), rngs=rngs), rngs=rngs)


class Network(nnx.Module):
    def __init__(self, kind, rngs):
        self.first = SelectiveConv(8, 8, (3, 3), rngs=rngs)
        self.between = kind(rngs)
        self.last = SelectiveConv(8, 4, (3, 3), rngs=rngs)

    def __call__(self, x):
        return self.last(self.between(self.first(x)))


KINDS = [Reading, Standardized, Tied, Remat, Jitted, Stack, normalized]


@pytest.mark.parametrize("kind", KINDS)
def test_layers_compute_with_the_variables_that_they_have_in_the_call(kind):
    module = Network(kind, nnx.Rngs(0))
    reallocate(module, jax.random.key(0), AllocationRule(threshold=0.3))
    # Kernels that are not normalized yet.
    nnx.update(module, jax.tree.map(lambda leaf: 1.3 * leaf, nnx.state(module, nnx.Param)))
    model, variables = to_linen(module)
    for train in (False, True):
        own = nnx.clone(module)
        getattr(own, "train" if train else "eval")()
        y = own(X)
        converted, changed = jax.jit(
            lambda variables, train: model.apply(variables, X, train=train, mutable=["batch_stats"]),
            static_argnums=1,
        )(variables, train)
        np.testing.assert_allclose(converted, y, rtol=1e-5, atol=1e-5)
        statistics = linen_variables(own)["batch_stats"]
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            changed["batch_stats"],
            statistics,
        )


@pytest.mark.parametrize("kind", [Reading, Remat, Jitted, normalized])
def test_compact_module_trains_on_as_the_whole_one(kind):
    module = Network(kind, nnx.Rngs(0))
    reallocate(module, jax.random.key(0), AllocationRule(threshold=0.4, top_k=0))
    nnx.update(module, jax.tree.map(lambda leaf: 1.3 * leaf, nnx.state(module, nnx.Param)))
    small = compact(module, X)
    assert small.model.layouts
    for mode in ("train", "eval"):
        getattr(module, mode)()
        getattr(small, mode)()
        np.testing.assert_allclose(small(X), module(X), rtol=1e-4, atol=1e-4)
    gradient = jax.tree.leaves(nnx.grad(lambda module: jnp.mean(module(X) ** 2))(small))
    assert all(np.isfinite(leaf).all() for leaf in gradient)


def test_layers_made_selective_under_remat_train_on():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.conv = nnx.Conv(8, 8, (3, 3), use_bias=False, rngs=rngs)

        @nnx.remat
        def __call__(self, x):
            return x + self.conv(nnx.relu(self.norm(x)))

    plain = Block(nnx.Rngs(0))
    selective, result = selectivize_module(plain, X)
    assert result.converted == {"conv": "norm"}
    for _ in range(2):
        np.testing.assert_allclose(selective(X), plain(X), rtol=1e-5, atol=1e-5)
    mean = linen_variables(selective)["batch_stats"]["network"]["conv"]["mean"]
    np.testing.assert_allclose(mean, plain.norm.mean[...], rtol=1e-5, atol=1e-6)


def test_a_program_that_nnx_jit_keeps_does_not_hold_the_variables_of_the_first_call():
    model, variables = to_linen(Network(Jitted, nnx.Rngs(0)))
    y = model.apply(variables, X, train=False)
    variables["params"]["between"]["conv"]["kernel"] *= 2
    assert not np.allclose(model.apply(variables, X, train=False), y)


def test_batch_norm_of_narrow_parameters_keeps_its_type():
    norm = nnx.BatchNorm(8, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    norm.mean[...] = norm.mean[...] + 0.123
    model, variables = to_linen(norm)
    with jax.numpy_dtype_promotion("standard"):
        y = norm(X.astype(jnp.bfloat16), use_running_average=True)
        converted = model.apply(variables, X.astype(jnp.bfloat16), train=False)
    assert converted.dtype == y.dtype
    np.testing.assert_allclose(converted, y, rtol=1e-6)


def test_parameters_that_are_numbers_of_python():
    class Scaled(nnx.Module):
        def __init__(self, rngs):
            self.conv = SelectiveConv(8, 4, (3, 3), rngs=rngs)
            self.temperature = nnx.Param(0.5)
            self.unused = nnx.Param(None)

        def __call__(self, x):
            return self.conv(x) * self.temperature

    module = Scaled(nnx.Rngs(0))
    assert linen_variables(module)["params"]["temperature"] == 0.5
    assert reallocate(module, jax.random.key(0), AllocationRule(threshold=0.3)).copies > 0
    assert module.temperature.get_value() == 0.5
    small = compact(module, X)
    for one in (module, small):
        one.eval()
    np.testing.assert_allclose(small(X), module(X), rtol=1e-5, atol=1e-5)


def test_a_kernel_size_of_numpy():
    assert SelectiveConv(8, 4, np.int64(3), rngs=nnx.Rngs(0)).kernel.shape == (3, 8, 4)
