"""The policy for optimizer state after re-allocation, over many optimizers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.traverse_util import path_aware_map

import selconv_jax
from selconv_jax import AllocationRule
from selconv_jax.models import DenseNet
from selconv_jax.train._config import OptimizerConfig
from selconv_jax.train._optimizer import make_optimizer
from states import perturbed_variables


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
    # As in Flax's guide to transfer learning.
    "labels by path": optax.multi_transform(
        {"trained": optax.adam(1e-3), "frozen": optax.set_to_zero()},
        lambda tree: path_aware_map(lambda path, _: "frozen" if "stem" in path else "trained", tree),
    ),
    "adagrad": optax.adagrad(0.1),  # starts at 0.1
    "rprop": optax.rprop(0.1),  # starts at the learning rate
    "muon": optax.contrib.muon(0.1),  # has constants in its state
    "schedule-free": optax.contrib.schedule_free_adamw(0.1),  # averages the parameters
    "prodigy": optax.contrib.prodigy(),  # keeps the first parameters
    "noise": optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.sgd(0.1, momentum=0.9)),
}


@pytest.fixture(scope="module")
def round_():
    model = DenseNet(num_classes=10, blocks=(1,), growth=4)
    variables = perturbed_variables(model, (1, 8, 8, 3), seed=0)
    new, report = selconv_jax.reallocate(variables, jax.random.key(0), AllocationRule(threshold=0.3))
    assert report.reallocated > 0
    return new["params"], report


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rewritten_entries_start_anew_and_nothing_else(name, round_):
    params, report = round_
    optimizer = OPTIMIZERS[name]
    start = optimizer.init(params)
    moved = jax.tree.map(
        lambda leaf: leaf + 1 if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.ndim else leaf, start
    )
    reset = selconv_jax.reset_rewritten(optimizer, moved, params, report)
    assert jax.tree.structure(reset) == jax.tree.structure(moved)
    masks = {
        jax.tree_util.keystr(path): np.broadcast_to(mask, leaf.shape)
        for (path, leaf), mask in zip(
            jax.tree_util.tree_leaves_with_path(params),
            jax.tree.leaves(selconv_jax.rewritten_mask(params, report)),
            strict=True,
        )
    }
    seen = set()
    for (path, value), old, first in zip(
        jax.tree_util.tree_leaves_with_path(reset),
        jax.tree.leaves(moved),
        jax.tree.leaves(start),
        strict=True,
    ):
        owner = next((key for key in masks if jax.tree_util.keystr(path).endswith(key)), None)
        if owner is None:
            assert value is old
        else:
            seen.add(owner)
            np.testing.assert_array_equal(value, np.where(masks[owner], first, old))
    assert any(masks[owner].any() for owner in seen)


@pytest.mark.parametrize(
    "optimizer",
    [optax.sm3(0.1), optax.flatten(optax.adam(0.1)), optax.novograd(0.1), optax.lbfgs(0.1)],
    ids=["sm3", "flatten", "novograd", "lbfgs"],
)
def test_state_that_cannot_be_told_apart_is_refused(optimizer, round_):
    params, report = round_
    with pytest.raises(ValueError, match="it cannot be reset by channel"):
        selconv_jax.reset_rewritten(optimizer, optimizer.init(params), params, report)


def test_the_state_of_another_optimizer_is_refused(round_):
    params, report = round_
    state = optax.sgd(0.1).init(params)
    with pytest.raises(ValueError, match="does not match this optimizer and these parameters"):
        selconv_jax.reset_rewritten(optax.adam(0.1), state, params, report)


def test_factored_state_is_refused_by_name(round_):
    params, report = round_
    optimizer = optax.scale_by_factored_rms(min_dim_size_to_factor=1)
    with pytest.raises(ValueError, match=r"optimizer's state for .* has shape .* cannot be reset by channel"):
        selconv_jax.reset_rewritten(optimizer, optimizer.init(params), params, report)


def test_parameters_of_another_model_are_refused(round_):
    params, report = round_
    with pytest.raises(ValueError, match="params has no kernel for selective layer 'block1_layer1/conv1'"):
        selconv_jax.rewritten_mask({"stem": params["stem"]}, report)


def test_a_round_of_a_part_is_named_by_its_path(round_):
    """The report of a part says nothing of the whole network's parameters until its layers are renamed."""
    params, report = round_
    optimizer = optax.sgd(0.1, momentum=0.9)
    momentum = jax.tree.map(jnp.ones_like, optimizer.init(params))
    part = selconv_jax.Report({"conv1": report.layers["block1_layer1/conv1"]})
    with pytest.raises(ValueError, match=r"or a selconv_jax\.Report whose names of layers begin"):
        selconv_jax.reset_rewritten(optimizer, momentum, params, part)
    whole = selconv_jax.Report({f"block1_layer1/{name}": layer for name, layer in part.layers.items()})
    state = selconv_jax.reset_rewritten(optimizer, momentum, params, whole)
    rewritten = np.asarray(part.layers["conv1"].reallocated)
    assert rewritten.any()
    expected = jax.tree.map(np.ones_like, jax.device_get(momentum[0].trace))
    for name in ("kernel", "scale", "bias", "shift"):
        value = np.moveaxis(expected["block1_layer1"]["conv1"][name], -2 if name == "kernel" else 0, 0)
        value[rewritten] = 0
    chex.assert_trees_all_equal(jax.device_get(state[0].trace), expected)


def test_an_nnx_module_is_refused_with_the_remedy(round_):
    module = selconv_jax.nnx.SelectiveConv(8, 4, (3, 3), rngs=nnx.Rngs(0))
    _, report = round_
    with pytest.raises(ValueError, match=r"reset by selconv_jax\.nnx\.reset_rewritten"):
        selconv_jax.reset_rewritten(optax.adam(0.1), (), module, report)
    graphdef, state = nnx.split(module)
    with pytest.raises(ValueError, match=r"an NNX State; pass the module, such as nnx\.merge"):
        selconv_jax.reallocate(state, jax.random.key(0))
    with pytest.raises(ValueError, match=r"an NNX State; pass the module, such as nnx\.merge"):
        selconv_jax.reallocate(nnx.State({"blocks": state}), jax.random.key(0))
    assert selconv_jax.reallocate(nnx.merge(graphdef, state), jax.random.key(0)).channels == 8


def test_mask_broadcasts_against_the_parameters(round_):
    params, report = round_
    masks = selconv_jax.rewritten_mask(params, report)
    conv = masks["block1_layer1"]["conv1"]
    capacity = np.asarray(report.layers["block1_layer1/conv1"].reallocated)
    assert conv["kernel"].shape == (1, 1, 8, 1)
    assert conv["shift"].shape == (8, 1)
    np.testing.assert_array_equal(np.ravel(conv["kernel"]), capacity)
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
