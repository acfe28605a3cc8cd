"""The policy for optimizer state after re-allocation, over many optimizers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from states import perturbed_variables

import selconv_jax
from selconv_jax import Allocation
from selconv_jax.models import DenseNet
from selconv_jax.train.config import OptimizerConfig
from selconv_jax.train.optimizer import make_optimizer


def is_wide(leaf):
    return leaf.ndim > 1


OPTIMIZERS = {
    "published": make_optimizer(OptimizerConfig(), 10),
    "published, shifts not trained": make_optimizer(OptimizerConfig(train_shift=False), 10),
    "adamw": optax.adamw(1e-3),
    "lars": optax.lars(0.1),
    "rmsprop": optax.rmsprop(1e-3, momentum=0.9),
    "clipped adam": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)),
    "accumulated": optax.MultiSteps(optax.sgd(0.1, momentum=0.9), 2),
    "masked": optax.masked(
        optax.sgd(0.1, momentum=0.9), lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)
    ),
    "injected": optax.inject_hyperparams(optax.sgd)(learning_rate=0.1, momentum=0.9),
    "two groups": optax.multi_transform(
        {"a": optax.adam(1e-3), "b": optax.sgd(0.1, momentum=0.9)},
        lambda tree: jax.tree.map(lambda x: "a" if is_wide(x) else "b", tree),
    ),
}


@pytest.fixture(scope="module")
def round_():
    model = DenseNet(num_classes=10, blocks=(1,), growth=4)
    variables = perturbed_variables(model, (1, 8, 8, 3), seed=0)
    new, report = selconv_jax.reallocate(variables, jax.random.key(0), Allocation(threshold=0.3))
    assert report.reallocated > 0
    return new["params"], report


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resets_the_rewritten_entries_and_nothing_else(name, round_):
    params, report = round_
    optimizer = OPTIMIZERS[name]
    state = optimizer.init(params)
    ones = jax.tree.map(
        lambda leaf: jnp.ones_like(leaf) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, state
    )
    reset = selconv_jax.reset_rewritten(optimizer, ones, params, report)
    assert jax.tree.structure(reset) == jax.tree.structure(ones)

    expected = jax.tree.map(jnp.ones_like, params)
    for path, layer in report.layers.items():
        block, conv = path.split("/")
        slots = np.flatnonzero(layer.reallocated)
        leaves = expected[block][conv]
        leaves["kernel"] = leaves["kernel"].at[:, :, slots].set(0)
        for key in ("scale", "bias", "shift"):
            if key in leaves:
                leaves[key] = leaves[key].at[slots].set(0)
    found = []
    optax.tree.map_params(
        optimizer,
        lambda value, want: found.append((value, want)),
        reset,
        expected,
        is_leaf=lambda value: isinstance(value, optax.MaskedNode),
    )
    assert any(not isinstance(value, optax.MaskedNode) for value, _ in found)
    for value, want in found:
        if isinstance(value, optax.MaskedNode):
            continue
        np.testing.assert_array_equal(value, want)


def test_factored_state_is_refused_by_name(round_):
    params, report = round_
    optimizer = optax.scale_by_factored_rms(min_dim_size_to_factor=1)
    with pytest.raises(ValueError, match=r"optimizer's state for .* has shape .* cannot be reset by channel"):
        selconv_jax.reset_rewritten(optimizer, optimizer.init(params), params, report)


def test_parameters_of_another_model_are_refused(round_):
    params, report = round_
    with pytest.raises(ValueError, match="params has no kernel for selective layer 'block1_layer1/conv1'"):
        selconv_jax.rewritten_mask({"stem": params["stem"]}, report)


def test_mask_broadcasts_against_the_parameters(round_):
    params, report = round_
    masks = selconv_jax.rewritten_mask(params, report)
    conv = masks["block1_layer1"]["conv1"]
    slots = np.asarray(report.layers["block1_layer1/conv1"].reallocated)
    assert conv["kernel"].shape == (1, 1, 8, 1)
    assert conv["shift"].shape == (8, 1)
    np.testing.assert_array_equal(np.ravel(conv["kernel"]), slots)
    assert not masks["stem"]["kernel"].any()


def test_published_step_by_hand():
    """Two Nesterov steps with both weight decays, worked out by hand."""
    config = OptimizerConfig(learning_rate=0.5, momentum=0.9, weight_decay=0.1, shift_weight_decay=0.01)
    optimizer = make_optimizer(config, steps=4)
    params = {"kernel": jnp.array([1.0]), "shift": jnp.array([2.0])}
    grads = {"kernel": jnp.array([0.2]), "shift": jnp.array([0.1])}
    state = optimizer.init(params)
    expected = {"kernel": 1.0, "shift": 2.0}
    velocity = {"kernel": 0.0, "shift": 0.0}
    decay = {"kernel": 0.1, "shift": 0.01}
    for step in range(2):
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        rate = 0.5 * 0.5 * (1 + np.cos(np.pi * step / 4))
        for key, value in expected.items():
            gradient = float(grads[key][0]) + decay[key] * value
            velocity[key] = 0.9 * velocity[key] + gradient
            expected[key] = value - rate * (gradient + 0.9 * velocity[key])
            assert float(params[key][0]) == pytest.approx(expected[key], rel=1e-6)


def test_shifts_stay_when_not_trained():
    optimizer = make_optimizer(OptimizerConfig(train_shift=False), steps=4)
    params = {"kernel": jnp.array([1.0]), "shift": jnp.array([2.0])}
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)
    assert float(updates["shift"][0]) == 0.0
    assert float(updates["kernel"][0]) != 0.0
