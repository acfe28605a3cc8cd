"""Compacted random networks compute what the whole ones do, by what is known of their programs alone."""

import jax
import numpy as np
import pytest
from flax import linen as nn

import selconv_jax
from compactions import images, quick_jit
from random_networks import SHAPE, random_network
from states import perturbed_variables


def outputs(model, variables, take):
    """In evaluation and in training, with dropout that drops nothing."""

    def keep_all(call, args, kwargs, context):
        return args[0] if isinstance(context.module, nn.Dropout) else call(*args, **kwargs)

    def run(variables):
        with nn.intercept_methods(keep_all):
            small = take(variables)
            evaluated = model.apply(small, images(SHAPE), train=False)
            return evaluated, model.apply(small, images(SHAPE), train=True, mutable=["batch_stats"])[0]

    return quick_jit(run)(variables)


def assert_same(seed):
    """Compacts and compares; whether channels were removed from what a layer makes."""
    model = random_network(seed)
    variables = perturbed_variables(model, SHAPE, seed, closed=0.4, copies=0.2)
    plan = selconv_jax.plan_compaction(model, variables, images(SHAPE), compare=False)
    expected = outputs(model, variables, lambda variables: variables)
    actual = outputs(plan.model, variables, plan.take)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        largest = float(np.abs(other).max())
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3 * largest + 1e-6, err_msg=str(seed))
    features = {f"step{number}": step[2] for number, step in enumerate(model.steps) if len(step) == 4}
    narrower = {path for path, layout in plan.model.layouts if layout.outputs < features.get(path, 0)}
    return bool(narrower or plan.model.widths)


def test_a_dozen():
    assert sum(assert_same(seed) for seed in range(12)) > 2


@pytest.mark.slow
@pytest.mark.parametrize("first", range(12, 1012, 50))
def test_a_thousand(first):
    assert sum(assert_same(seed) for seed in range(first, first + 50)) > 5
