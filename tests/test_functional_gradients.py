"""Gradients of shift and selection."""

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
