"""Mixup: the weights, the partners, and the sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selconv_jax.data._augment import draw_mixup, mix


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_weights_have_the_moments_of_the_beta_distribution(alpha):
    keys = jax.random.split(jax.random.key(0), 4000)
    weights = np.asarray(jax.vmap(lambda key: draw_mixup(key, alpha, 3)[0])(keys))
    assert weights.dtype == np.float32
    assert weights.min() >= 0
    assert weights.max() <= 1
    assert weights.mean() == pytest.approx(0.5, abs=0.02)
    assert weights.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.08)


def test_partners_are_every_permutation():
    keys = jax.random.split(jax.random.key(1), 600)
    partners = np.asarray(jax.vmap(lambda key: draw_mixup(key, 1.0, 3)[1])(keys))
    found, counts = np.unique(partners, axis=0, return_counts=True)
    assert found.tolist() == [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]]
    assert counts.min() > 60


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sums(dtype):
    images = jax.random.normal(jax.random.key(0), (4, 5, 5, 2)).astype(dtype)
    partners = jnp.array([2, 0, 3, 1])
    mixed = jax.jit(mix)(images, jnp.float32(0.3), partners)
    assert mixed.dtype == dtype
    values = np.asarray(images, np.float32)
    expected = 0.3 * values + 0.7 * values[[2, 0, 3, 1]]
    np.testing.assert_allclose(
        np.asarray(mixed, np.float32),
        expected,
        rtol=1e-6 if dtype == jnp.float32 else 1e-2,
        atol=1e-2 * (dtype != jnp.float32) + 1e-6,
    )
