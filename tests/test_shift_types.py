"""Shifts in narrow types: positions are counted in float32."""

import jax.numpy as jnp
import numpy as np
import pytest

from selconv_jax.functional import channel_shift


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_zero_shift_of_a_wide_image_is_the_identity(dtype):
    x = jnp.arange(300.0, dtype=jnp.float32).reshape(1, 300, 1)
    np.testing.assert_array_equal(channel_shift(x, jnp.zeros((1, 1), dtype)), x)


def test_a_narrow_shift_is_applied_exactly():
    x = jnp.arange(300.0, dtype=jnp.float32).reshape(1, 300, 1)
    shifted = channel_shift(x, jnp.full((1, 1), 0.25, jnp.bfloat16))
    np.testing.assert_array_equal(shifted[0, :-1, 0], x[0, :-1, 0] + 0.25)
