"""Gradients over devices and in parts, against the same computed by hand on one device."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from runs import QUICK
from selconv_jax import SelectiveConv
from selconv_jax.train._distributed.sharding import Placement
from selconv_jax.train._gradients import Examples, Mixture, Seen, batch_gradients
from selconv_jax.train._state import Totals

BATCH = 16


class Small(nn.Module):
    """Two selective layers and a head, as networks have them."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(6, (3, 3), use_bias=False)(x)
        x = SelectiveConv(8, (1, 1), capacity=0.5)(x, train)
        x = SelectiveConv(8, (3, 3), capacity=0.0, dropout_rate=0.0)(x, train)
        return nn.Dense(3)(jnp.mean(x, axis=(1, 2)))


MODEL = Small()


@pytest.fixture(scope="module")
def variables():
    rng = np.random.default_rng(0)
    variables = MODEL.init(jax.random.key(0), jnp.zeros((1, 6, 6, 2)), train=False)
    source = jnp.asarray([-1, 0, 0, -1, 2, -1], jnp.int32)
    variables["selectivity"]["SelectiveConv_0"]["source"] = source
    shift = variables["params"]["SelectiveConv_0"]["shift"]
    variables["params"]["SelectiveConv_0"]["shift"] = jnp.asarray(
        rng.uniform(-1.5, 1.5, shift.shape), shift.dtype
    )
    return variables


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(1)
    images = rng.normal(size=(BATCH, 6, 6, 2)).astype(np.float32)
    return Examples(jnp.asarray(images), jnp.asarray(rng.integers(0, 3, BATCH), jnp.int32))


def by_hand(variables, examples, rows, batch_stats):
    """Gradient, statistics and totals of some rows of a batch."""

    def loss_of(params):
        logits, changed = MODEL.apply(
            {**variables, "params": params, "batch_stats": batch_stats},
            examples.images[rows],
            train=True,
            mutable=["batch_stats"],
        )
        labels = examples.labels[rows]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        correct = jnp.sum(jnp.argmax(logits, axis=1) == labels)
        return jnp.mean(losses), (changed["batch_stats"], jnp.sum(losses), correct)

    grads, (stats, loss, correct) = jax.grad(loss_of, has_aux=True)(variables["params"])
    return grads, Seen(stats, Totals(loss, correct, jnp.asarray(len(rows)), jnp.asarray(len(rows))))


def mean(trees):
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *trees)


def assert_close(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        expected = functools.reduce(lambda node, key: node[key.key], path, other)
        np.testing.assert_allclose(leaf, expected, rtol=2e-4, atol=2e-6, err_msg=jax.tree_util.keystr(path))


def assert_same(result, grads, stats, totals):
    assert_close(result[0], grads)
    assert_close(result[1].batch_stats, stats)
    assert float(result[1].totals.loss) == pytest.approx(float(totals.loss), rel=1e-5)
    assert int(result[1].totals.correct) == int(totals.correct)
    assert int(result[1].totals.count) == BATCH
    assert result[1].totals.correct.dtype == jnp.int32


def compiled(**options):
    function = functools.partial(batch_gradients, MODEL, **options)
    return jax.jit(function, compiler_options=QUICK)


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_global_statistics_are_those_of_one_device(variables, examples, devices):
    grads, seen = by_hand(variables, examples, np.arange(BATCH), variables["batch_stats"])
    placement = Placement.of(jax.devices()[:devices])
    split = jax.tree.map(lambda x: jax.device_put(x, placement.split), examples)
    result = compiled(placement=placement)(placement.replicate(variables), split, jax.random.key(0))
    assert_same(result, grads, seen.batch_stats, seen.totals)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_each_device_for_itself(variables, examples, micro_batches):
    """The mean of the gradients, and of the statistics, of what each of four devices sees."""
    devices = 4
    placement = Placement.of(jax.devices()[:devices])
    gradients, statistics, totals = [], [], Totals.zero()
    for rows in np.arange(BATCH).reshape(devices, -1):
        stats, parts = variables["batch_stats"], []
        for number in range(micro_batches):
            grads, seen = by_hand(variables, examples, rows[number::micro_batches], stats)
            stats, totals = seen.batch_stats, totals + seen.totals
            parts.append(grads)
        gradients.append(mean(parts))
        statistics.append(stats)
    function = compiled(placement=placement, batch_norm="per_device", micro_batches=micro_batches)
    split = jax.tree.map(lambda x: jax.device_put(x, placement.split), examples)
    result = function(placement.replicate(variables), split, jax.random.key(0))
    assert_same(result, mean(gradients), mean(statistics), totals)
    for leaf in jax.tree.leaves(result):
        assert leaf.sharding.is_fully_replicated


@pytest.mark.parametrize("devices", [1, 4])
def test_micro_batches_are_every_second_example(variables, examples, devices):
    """Whatever the devices: the parts are the same."""
    stats, parts, totals = variables["batch_stats"], [], Totals.zero()
    for number in range(2):
        grads, seen = by_hand(variables, examples, np.arange(number, BATCH, 2), stats)
        stats, totals = seen.batch_stats, totals + seen.totals
        parts.append(grads)
    placement = Placement.of(jax.devices()[:devices])
    result = compiled(placement=placement, micro_batches=2)(
        placement.replicate(variables), placement.replicate(examples), jax.random.key(0)
    )
    assert_same(result, mean(parts), stats, totals)


def test_two_messages_make_a_step_per_device(variables, examples):
    """One for the gradient, one for statistics and counts, and none in any layer."""
    placement = Placement.of(jax.devices()[:4])
    function = compiled(placement=placement, batch_norm="per_device")
    text = function.lower(placement.replicate(variables), examples, jax.random.key(0)).as_text()
    assert text.count("stablehlo.all_reduce") == 2
    assert "all_gather" not in text


def test_mixtures_weigh_both_labels(variables, examples):
    weight = jnp.full(BATCH, 0.25)
    others = (examples.labels + 1) % 3
    mixed = Examples(examples.images, examples.labels, Mixture(others, weight))
    swapped = Examples(examples.images, others, Mixture(examples.labels, 1 - weight))
    function = compiled()
    grads, seen = function(variables, mixed, jax.random.key(0))
    other_grads, other_seen = function(variables, swapped, jax.random.key(0))
    assert_close(grads, other_grads)
    assert float(seen.totals.loss) == pytest.approx(float(other_seen.totals.loss), rel=1e-5)
    # The label with the larger weight counts.
    assert int(seen.totals.correct) == int(
        function(variables, Examples(examples.images, others), jax.random.key(0))[1].totals.correct
    )
