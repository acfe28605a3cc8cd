"""What the tests of compaction share: networks, allocations by hand, and the comparison with the whole."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np

import selconv_jax
from runs import QUICK
from selconv_jax.models import CondenseNet, DenseNet, PreResNet, ResNeXt

SHAPE = (4, 8, 8, 3)
NETWORKS = {
    "densenet": DenseNet(5, (2, 1), growth=4),
    "densenet_bc": DenseNet(5, (2, 1), growth=4, compression=0.5),
    "preresnet": PreResNet(5, (1, 1), width=4),
    "resnext": ResNeXt(5, (1, 1), groups=2, base_width=4, widen=1),
    "condensenet": CondenseNet(5, (2, 1), growth=(4, 8), variant="selective", dropout_rate=0.0),
}


def quick_jit(function):
    return jax.jit(function, compiler_options=QUICK)


def images(shape=SHAPE):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def measure(model, variables, x, take=lambda variables: variables):
    """Everything a network computes: evaluation, training, statistics, gradients of the whole parameters."""

    def loss(params):
        y, changed = model.apply(
            take({**variables, "params": params}), x, train=True, mutable=["batch_stats"]
        )
        weights = jnp.arange(1.0, y.size + 1).reshape(y.shape) / y.size
        return jnp.sum(jnp.square(y) * weights), (y, changed["batch_stats"])

    gradients, (trained, stats) = jax.grad(loss, has_aux=True)(variables["params"])
    evaluated = model.apply(take(variables), x, train=False)
    return evaluated, trained, stats, gradients


@functools.lru_cache(maxsize=16)
def _whole(model):
    return quick_jit(functools.partial(measure, model))


def assert_same_function(model, variables, x=None, **options):
    """Compacts and compares; returns the plan and the small variables."""
    x = images() if x is None else x
    # Compared here, and more thoroughly: what is known of the programs has to be right without it.
    plan = selconv_jax.plan_compaction(model, variables, x, compare=False, **options)
    expected = _whole(model)(variables, x)
    actual = quick_jit(functools.partial(measure, plan.model, take=plan.take))(variables, x)
    for name, one, other in zip(("evaluated", "trained"), actual, expected, strict=False):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * np.abs(other).max(), err_msg=name)
    assert_close_trees(actual[3], expected[3], 1e-4)
    small = plan.take(variables)
    stats = {"batch_stats": variables["batch_stats"]}
    is_kept = plan.put(jax.tree.map(np.zeros_like, stats), plan.take(jax.tree.map(np.ones_like, stats)))
    whole_stats = jax.tree.map(
        lambda kept, new, old: np.where(kept > 0, new, old),
        is_kept["batch_stats"],
        expected[2],
        variables["batch_stats"],
    )
    assert_close_trees(plan.put(stats, {"batch_stats": actual[2]})["batch_stats"], whole_stats, 1e-5)
    assert_equal_trees(plan.put(variables, small), variables)
    return plan, small


def assert_close_trees(actual, expected, tolerance):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(
            one, other, rtol=tolerance, atol=tolerance * largest, err_msg=jax.tree_util.keystr(path)
        )


def assert_equal_trees(actual, expected):
    chex.assert_trees_all_equal(actual, expected)


def close(variables, path, channels):
    """The variables with channels of a layer closed, by its path."""
    return _changed(variables, path, "gate", lambda gate: gate.at[jnp.array(channels)].set(False))


def copy(variables, path, channel, source):
    """The variables with a channel of a layer a copy."""
    return _changed(variables, path, "source", lambda array: array.at[channel].set(source))


def _changed(variables, path, field, change):
    tree = jax.tree.map(lambda leaf: leaf, variables["selectivity"])
    layer = functools.reduce(lambda branch, name: branch[name], path.split("/") if path else [], tree)
    layer[field] = change(layer[field])
    return {**variables, "selectivity": tree}
