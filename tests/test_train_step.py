"""A training step: mixup's loss and counts against NumPy, totals, batches that are partly no images."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from selconv_jax.data._augment import draw_mixup, normalize
from selconv_jax.data._dataset import DatasetInfo
from selconv_jax.train._state import initial_state
from selconv_jax.train._step import Purpose, eval_batch, fold, train_step

pytestmark = pytest.mark.optimized

INFO = DatasetInfo("toy", (4, 4, 1), 3, None, (0.5,), (0.25,), 0, False)
RATE = 0.1


class Linear(nn.Module):
    dtype = None

    @nn.compact
    def __call__(self, x, train):
        self.variable("batch_stats", "unused", jnp.zeros, ())
        return nn.Dense(3)(x.reshape(len(x), -1))


MODEL, OPTIMIZER = Linear(), optax.sgd(RATE)
IMAGES = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 1), dtype=np.uint8)
LABELS = np.arange(8, dtype=np.int32) % 3


@pytest.fixture(scope="module")
def state():
    return initial_state(MODEL, OPTIMIZER, INFO.image_shape, 0)


def step(state, mixup=0.0):
    function = jax.jit(train_step, static_argnames=("model", "optimizer", "info", "steps_per_epoch", "mixup"))
    return function(
        state, IMAGES, LABELS, model=MODEL, optimizer=OPTIMIZER, info=INFO, steps_per_epoch=2, mixup=mixup
    )


def reference(params, images, targets):
    """Loss and gradient of the kernel for targets ``[N, 3]`` that sum to 1."""
    flat = images.reshape(len(images), -1)
    logits = flat @ np.asarray(params["Dense_0"]["kernel"], np.float64) + np.asarray(
        params["Dense_0"]["bias"]
    )
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    loss = -(targets * np.log(shares)).sum(1).mean()
    return loss, flat.T @ (shares - targets) / len(images), logits.argmax(1)


@pytest.mark.parametrize("mixup", [0.0, 0.3])
@pytest.mark.parametrize("number", [0, 1, 5])
def test_loss_gradient_and_counts(state, mixup, number):
    state = dataclasses.replace(state, step=jnp.asarray(number, jnp.int32))
    after = step(state, mixup)
    images, targets = np.asarray(normalize(IMAGES, INFO.mean, INFO.std), np.float64), np.eye(3)[LABELS]
    counted = LABELS
    if mixup:
        weight, partners = draw_mixup(fold(state.key, Purpose.MIXUP, number), mixup, 8)
        weight, partners = float(weight), np.asarray(partners)
        images = weight * images + (1 - weight) * images[partners]
        targets = weight * targets + (1 - weight) * targets[partners]
        counted = LABELS if weight >= 0.5 else LABELS[partners]
    loss, gradient, guesses = reference(state.params, images, targets)
    assert float(after.totals.loss) == pytest.approx(8 * loss, rel=1e-5)
    assert int(after.totals.correct) == (guesses == counted).sum()
    moved = np.asarray(state.params["Dense_0"]["kernel"]) - np.asarray(after.params["Dense_0"]["kernel"])
    np.testing.assert_allclose(moved, RATE * gradient, rtol=1e-4, atol=1e-6)


def test_totals_start_anew_with_an_epoch(state):
    first = step(state)
    second = step(first)
    third = step(second)
    assert [int(after.totals.count) for after in (first, second, third)] == [8, 16, 8]
    assert int(third.step) == 3
    assert int(third.failed_step) == -1


def test_evaluation_counts_no_image_with_a_negative_label(state):
    def totals(labels):
        return eval_batch(state.variables, IMAGES, labels, model=MODEL, info=INFO)

    labels = jnp.where(jnp.arange(8) < 5, LABELS, -1)
    part = eval_batch(state.variables, IMAGES[:5], LABELS[:5], model=MODEL, info=INFO)
    some = totals(labels)
    assert int(some.count) == 5
    assert float(some.loss) == pytest.approx(float(part.loss), rel=1e-6)
    assert (int(some.correct), int(some.correct_top5)) == (int(part.correct), int(part.correct_top5))
    assert int(totals(jnp.full(8, -1)).count) == 0
