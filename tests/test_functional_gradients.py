"""Gradients of shift, selection, damage and scores."""

import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import oracle
from array_functions import many, precision
from selconv_jax import functional
from strategies import SHAPES, Recipe


def gradients(x, shift, cotangent):
    return jax.vjp(functional.channel_shift, x, shift)[1](cotangent)


jitted_gradients = jax.jit(gradients)


@many(max_examples=25)
@given(shape=st.sampled_from(sorted(SHAPES)), seed=st.integers(0, 2**32 - 1))
def test_gradients_of_shift_are_central_differences(shape, seed):
    sizes = SHAPES[shape]
    generator = np.random.default_rng(seed)
    x = Recipe(shape, seed).image()
    offset = (sizes.channels, len(sizes.image))
    # Kinks are at whole pixels.
    shift = generator.integers(-5, 5, offset) + generator.uniform(0.1, 0.9, offset)
    cotangent = generator.normal(size=x.shape)
    direction = generator.normal(size=x.shape)
    with precision(np.float64):
        grad_x, grad_shift = map(np.asarray, jitted_gradients(x, shift, cotangent))
    assert grad_x.dtype == grad_shift.dtype == np.float64
    # Linear in x.
    np.testing.assert_allclose(
        np.sum(grad_x * direction), np.sum(oracle.shift(direction, shift) * cotangent), atol=1e-11
    )
    step = 1e-5
    for axis in range(len(sizes.image)):
        moved = np.zeros(offset)
        moved[:, axis] = step
        difference = oracle.shift(x, shift + moved) - oracle.shift(x, shift - moved)
        expected = (difference * cotangent).sum(tuple(range(x.ndim - 1))) / (2 * step)
        np.testing.assert_allclose(grad_shift[:, axis], expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("amount", [4.0, 4.5, 1e6, -4.0, -4.5, -1e6])
def test_gradient_at_and_beyond_the_clamp_is_zero(amount):
    x = np.random.default_rng(0).normal(size=(2, 5, 3))
    shift = np.full((3, 1), amount)
    with precision(np.float64):
        grad_x, grad_shift = map(np.asarray, jitted_gradients(x, shift, np.ones_like(x)))
    assert not grad_shift.any()
    border = 4 if amount > 0 else 0
    assert np.all(grad_x[:, border] == 5)  # every pixel reads the border
    assert np.all(np.delete(grad_x, border, axis=1) == 0)


@pytest.mark.parametrize(
    ("amount", "expected"),
    [
        # Rows 0 ... 4 hold 0, 1, 10, 100, 1000. Coordinates 1, 2, 3 lie inside; 0 and 4 are at the
        # clamp. At a whole pixel the gradient is the difference to the next one.
        (0.0, 9 + 90 + 900),
        (1.0, 9 + 90 + 900),
        (-1.0, 9 + 90 + 900),
        (2.0, 90 + 900),
        (-3.0, 9),
        (0.5, 1 + 9 + 90 + 900),
        (-0.5, 1 + 9 + 90 + 900),
        (3.5, 900),
    ],
)
def test_gradient_of_whole_and_clamped_pixels(amount, expected):
    x = np.array([0.0, 1.0, 10.0, 100.0, 1000.0]).reshape(1, 5, 1)
    with precision(np.float64):
        _, grad_shift = jitted_gradients(x, np.array([[amount]]), np.ones_like(x))
    assert grad_shift.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.usefixtures("device_count")
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_select(shape):
    recipe = Recipe(shape, 0, copies=0.6, closed=0.2)
    x, shift, source = recipe.image(), recipe.shifts(), recipe.layer().source
    cotangent, direction = np.random.default_rng(0).normal(size=(2, *x.shape))
    unread = np.where(source[:, None] == -1, np.nan, shift)  # shifts without effect

    @jax.jit
    def gradients(x, shift):
        return jax.vjp(lambda *inputs: functional.select(inputs[0], source, inputs[1]), x, shift)[1](
            cotangent
        )

    with precision(np.float64):
        grad_x, grad_shift = map(np.asarray, gradients(x, unread))
    np.testing.assert_allclose(
        np.sum(grad_x * direction),
        np.sum(oracle.select(direction, source, shift) * cotangent),
        atol=1e-11,
    )
    np.testing.assert_array_equal(grad_shift[source == -1], 0.0)
    step = 1e-6
    for axis in range(shift.shape[1]):
        moved = np.zeros_like(shift)
        moved[:, axis] = step
        difference = oracle.select(x, source, shift + moved) - oracle.select(x, source, shift - moved)
        expected = (difference * cotangent).sum(tuple(range(x.ndim - 1))) / (2 * step)
        np.testing.assert_allclose(grad_shift[:, axis], expected, rtol=0, atol=1e-7)


def density(ratio):
    return math.exp(-(ratio**2) / 2) / math.sqrt(2 * math.pi)


@pytest.mark.parametrize("scale", [1e-30, -1e-30, 2.0, 0.0])
@pytest.mark.parametrize("ratio", [0.0, 1.5, -0.5, 1e12, -1e12])
def test_gradient_of_damage_of_narrow_channels(scale, ratio):
    bias = ratio * abs(scale) if scale else ratio
    kernel, gate = np.ones((1, 1, 1), np.float32), np.ones(1, bool)

    def damage(scale, bias):
        return functional.expected_channel_damage(kernel, scale, bias, gate)[0, 0]

    arguments = [np.array([value], np.float32) for value in (scale, bias)]
    by_scale, by_bias = jax.grad(damage, (0, 1))(*arguments)
    expected = (1 + math.erf(ratio / math.sqrt(2))) / 2 if scale else np.heaviside(bias, 0.5)
    assert by_bias.item() == pytest.approx(expected, rel=1e-5)
    assert by_scale.item() == pytest.approx(np.sign(scale) * density(ratio), rel=1e-5)
    forward = jax.jacfwd(damage, (0, 1))(*arguments)
    assert [each.item() for each in forward] == [by_scale.item(), by_bias.item()]


def test_second_derivatives_of_damage():
    scale, bias = -0.8, 0.5
    kernel, gate = np.ones((1, 1, 1)), np.ones(1, bool)
    with precision(np.float64):
        hessian = jax.hessian(
            lambda both: functional.expected_channel_damage(kernel, both[:1], both[1:], gate)[0, 0]
        )(np.array([scale, bias]))
    # The derivatives are sign(scale) density(r) and distribution(r), where r = bias / |scale|.
    ratio = bias / abs(scale)
    mixed = -ratio * density(ratio) * np.sign(scale) / abs(scale)
    expected = [[ratio**2 * density(ratio) / abs(scale), mixed], [mixed, density(ratio) / abs(scale)]]
    np.testing.assert_allclose(hessian, expected, rtol=1e-12)


def test_gradient_of_scores_of_channels_without_damage_is_zero():
    normalized = np.array([[0.6, 0.0, 0.4], [0.8, 0.0, 0.2]], np.float32)
    gradient = jax.grad(lambda matrix: functional.channel_scores(matrix, None).sum())(normalized)
    norms = np.sqrt((normalized**2).sum(axis=0))
    np.testing.assert_allclose(gradient, normalized / np.where(norms > 0, norms, 1), rtol=1e-6)
