"""Selective layers under nn.remat, nn.scan and nn.vmap, and the transforms of stacked layers."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import selconv_jax
from selconv_jax import AllocationRule, SelectiveConv
from states import perturbed_variables

AXES = {"params": 0, "batch_stats": 0, "selectivity": 0}
LENGTH = 3
SHAPE = (2, 6, 6, 12)


class Block(nn.Module):
    groups: int = 1

    @nn.compact
    def __call__(self, x, train):
        return x + SelectiveConv(12, (3, 3), feature_group_count=self.groups, name="conv")(x, train), None


class Scanned(nn.Module):
    groups: int = 1

    @nn.compact
    def __call__(self, x, train):
        blocks = nn.scan(
            Block, variable_axes=AXES, split_rngs={"params": True}, in_axes=nn.broadcast, length=LENGTH
        )
        return blocks(self.groups, name="blocks")(x, train)[0]


def layer_of(variables, index):
    """The variables of one layer of the stack."""
    return jax.tree.map(lambda leaf: leaf[index], variables)


@pytest.fixture(scope="module", params=[1, 3], ids=["dense", "groups"])
def scanned(request):
    model = Scanned(request.param)
    variables = perturbed_variables(model, SHAPE, seed=1, closed=0.3, copies=0.3)
    new, report = selconv_jax.reallocate(variables, jax.random.key(1), AllocationRule(threshold=0.2))
    return model, variables, new, report


def test_a_round_of_a_stack_is_a_round_of_each_layer(scanned):
    _, variables, new, report = scanned
    assert list(report.layers) == ["blocks/conv"]
    round_ = report.layers["blocks/conv"]
    closing = AllocationRule(threshold=0.2, top_k=0)
    for index in range(LENGTH):
        before, after = layer_of(variables, index), layer_of(new, index)
        closed, alone = selconv_jax.reallocate(before, jax.random.key(1), closing)
        layer = alone.layers["blocks/conv"]
        np.testing.assert_array_equal(round_.deallocated[index], layer.deallocated)
        conv = closed["selectivity"]["blocks"]["conv"]
        np.testing.assert_array_equal(round_.reallocated[index], ~conv["gate"])
        kept = np.asarray(conv["gate"])
        np.testing.assert_array_equal(
            after["selectivity"]["blocks"]["conv"]["source"][kept], conv["source"][kept]
        )
    assert report.deallocated > 0
    assert report.reallocated > 0


def test_filling_slots_of_a_stack_does_not_change_the_function(scanned):
    model, variables, new, _ = scanned
    x = jax.random.normal(jax.random.key(0), SHAPE)
    closed, _ = selconv_jax.reallocate(variables, jax.random.key(1), AllocationRule(threshold=0.2, top_k=0))
    apply = jax.jit(lambda variables: model.apply(variables, x, False))
    np.testing.assert_allclose(apply(new), apply(closed), rtol=1e-5, atol=1e-5)
    assert np.abs(apply(variables) - apply(closed)).max() > 0  # closing itself does change it


def test_counts_of_a_stack(scanned):
    _, _, new, report = scanned
    layer = report.layers["blocks/conv"]
    conv = new["selectivity"]["blocks"]["conv"]
    assert layer.open.shape == layer.copies.shape == (LENGTH,)
    np.testing.assert_array_equal(layer.copies, (conv["source"] >= 0).sum(axis=1))
    assert report.channels == LENGTH * 12
    assert report.open == conv["gate"].sum()
    assert selconv_jax.required_capacity(new) == pytest.approx(int(layer.copies.max()) / 12)
    assert len(set(layer.copies.tolist())) > 1  # so that the largest of them is a choice


def test_layers_of_a_stack_draw_apart_and_alike_in_longer_stacks(scanned):
    _, variables, new, _ = scanned
    short, _ = selconv_jax.reallocate(
        jax.tree.map(lambda leaf: leaf[:2], variables), jax.random.key(1), AllocationRule(threshold=0.2)
    )
    chex.assert_trees_all_close(short, jax.tree.map(lambda leaf: leaf[:2], new), rtol=1e-6)
    same = jax.tree.map(lambda leaf: jnp.stack([leaf[0]] * 2), variables)
    # Not replicas, which are refused.
    same["params"]["blocks"]["conv"]["bias"] += jnp.array([[0.0], [1e-6]])
    twins, _ = selconv_jax.reallocate(same, jax.random.key(1), AllocationRule(threshold=0.2))
    first, second = twins["params"]["blocks"]["conv"]["shift"]
    assert np.abs(first - second).max() > 0.1


def test_stacks_of_stacks():
    layer = SelectiveConv(4, (3,))
    flat = [perturbed_variables(layer, (2, 6, 8), seed=seed) for seed in range(6)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves).reshape(2, 3, *leaves[0].shape), *flat)
    new, report = selconv_jax.reallocate(stack, jax.random.key(0), AllocationRule(threshold=0.3))
    assert report.layers[""].open.shape == (2, 3)
    assert new["params"]["shift"].shape == (2, 3, 8, 1)
    row = jax.tree.map(lambda leaf: leaf.reshape(6, *leaf.shape[2:]), stack)
    expected, _ = selconv_jax.reallocate(row, jax.random.key(0), AllocationRule(threshold=0.3))
    chex.assert_trees_all_close(
        jax.tree.map(lambda leaf: leaf.reshape(6, *leaf.shape[2:]), new), expected, rtol=1e-6
    )


def test_a_stack_beside_single_layers_leaves_their_draws():
    single = perturbed_variables(SelectiveConv(4, (3, 3)), SHAPE, seed=0)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), single)
    together = {name: {"single": single[name], "stack": stacked[name]} for name in single}
    alone = {name: {"single": single[name]} for name in single}
    rule = AllocationRule(threshold=0.2)
    new, _ = selconv_jax.reallocate(together, jax.random.key(3), rule)
    expected, report = selconv_jax.reallocate(alone, jax.random.key(3), rule)
    assert report.reallocated > 0
    np.testing.assert_array_equal(
        new["params"]["single"]["shift"], expected["params"]["single"]["shift"], strict=True
    )


def test_optimizer_state_of_a_stack(scanned):
    _, _, new, report = scanned
    optimizer = optax.sgd(0.1, momentum=0.9)
    ones = jax.tree.map(jnp.ones_like, optimizer.init(new["params"]))
    reset = selconv_jax.reset_rewritten(optimizer, ones, new["params"], report)
    momentum = reset[0].trace["blocks"]["conv"]
    filled = np.asarray(report.layers["blocks/conv"].reallocated)
    np.testing.assert_array_equal(momentum["scale"] == 0, filled)
    np.testing.assert_array_equal((momentum["shift"] == 0).all(axis=2), filled)
    # A slot's row is as many kernel entries in a layer with groups as there are outputs in its group.
    shape = momentum["kernel"].shape
    assert (momentum["kernel"] == 0).sum() == filled.sum() * 9 * shape[-2]


@pytest.mark.parametrize("moved", ["params", "selectivity", "all"])
def test_layers_stacked_on_another_axis_are_refused(moved):
    variables = perturbed_variables(SelectiveConv(4, (3, 3)), SHAPE, seed=0)
    stacked = {
        name: jax.tree.map(lambda leaf, axis=axis: jnp.stack([leaf] * 2, axis=axis), leaves)
        for name, leaves in variables.items()
        for axis in [1 if moved in (name, "all") else 0]
    }
    with pytest.raises(ValueError, match="must be stacked on axis 0 of every collection"):
        selconv_jax.reallocate(stacked, jax.random.key(0))


def test_under_vmap():
    stack = nn.vmap(
        SelectiveConv, variable_axes=AXES, split_rngs={"params": True}, in_axes=(0, None), out_axes=0
    )(4, (3, 3))
    x = jax.random.normal(jax.random.key(0), (2, *SHAPE))
    variables = jax.jit(lambda key: stack.init(key, x, False))(jax.random.key(1))
    new, report = selconv_jax.reallocate(variables, jax.random.key(2), AllocationRule(threshold=0.3))
    assert report.layers[""].deallocated.shape == (2, 12)
    assert report.reallocated > 0
    output, changed = jax.jit(lambda: stack.apply(new, x, True, mutable=["batch_stats"]))()
    layer = SelectiveConv(4, (3, 3))
    alone = jax.jit(lambda variables, x: layer.apply(variables, x, True, mutable=["batch_stats"]))
    for index in range(2):
        expected, stats = alone(layer_of(new, index), x[index])
        np.testing.assert_allclose(output[index], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            changed["batch_stats"]["var"][index], stats["batch_stats"]["var"], rtol=1e-5
        )


def test_under_remat():
    layer = SelectiveConv(4, (3, 3))
    lean = nn.remat(SelectiveConv, static_argnums=(2,))(4, (3, 3))
    x = jax.random.normal(jax.random.key(0), SHAPE)
    variables = perturbed_variables(layer, SHAPE, seed=0, copies=0.5)

    def gradients(module):
        def loss(params):
            y, changed = module.apply({**variables, "params": params}, x, True, mutable=["batch_stats"])
            return jnp.sum(jnp.square(y)), changed["batch_stats"]["mean"]

        return jax.jit(jax.grad(loss, has_aux=True))(variables["params"])

    (actual, mean), (expected, expected_mean) = gradients(lean), gradients(layer)
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-6)
    for name, gradient in expected.items():
        np.testing.assert_allclose(actual[name], gradient, rtol=1e-3, atol=1e-3, err_msg=name)
    assert np.abs(expected["shift"]).max() > 0


def test_traced_train_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"train is traced.*static_argnums=\(2,\) for nn.remat"):
        nn.remat(SelectiveConv)(4, (3, 3)).init(jax.random.key(0), jnp.ones(SHAPE), False)


JitBlock = nn.jit(Block, static_argnums=(2,))


class Jitted(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        for index in range(2):
            x = nn.Conv(12, (1, 1), name=f"pointwise{index}")(x)
            x = JitBlock(name=f"block{index}")(x, train)[0]
        return x.mean(axis=(1, 2))


class JittedInSetup(nn.Module):
    def setup(self):
        self.pointwise0, self.pointwise1 = (nn.Conv(12, (1, 1)) for _ in range(2))
        self.block0, self.block1 = JitBlock(), JitBlock()

    def __call__(self, x, train):
        x = self.block0(self.pointwise0(x), train)[0]
        return self.block1(self.pointwise1(x), train)[0].mean(axis=(1, 2))


WHOLE = nn.jit(Jitted, static_argnums=(2,), static_argnames=("train",))
NETWORKS = (Jitted, JittedInSetup, WHOLE)


@pytest.mark.parametrize("network", NETWORKS, ids=["compact", "setup", "whole"])
def test_programs_that_nn_jit_keeps_do_not_outlive_what_they_were_traced_for(network):
    model, x = network(), jax.random.normal(jax.random.key(0), SHAPE)
    before = perturbed_variables(model, SHAPE, seed=2)
    # Blocks with equal attributes and different numbers of copies.
    source = jnp.full(12, -1)
    sources = {f"block{index}": source.at[: 4 * index + 1].set(11) for index in range(2)}
    selectivity = {
        name: {"conv": {**before["selectivity"][name]["conv"], "source": source}}
        for name, source in sources.items()
    }
    after = {**before, "selectivity": selectivity}
    expected = {key: model.apply(variables, x, False) for key, variables in (("0", before), ("1", after))}

    @functools.partial(jax.jit, static_argnums=0)
    def apply(model, variables):
        return model.apply(variables, x, False)

    for variables, key in ((before, "0"), (after, "1")):
        with_few = selconv_jax.with_capacity(model, variables)
        np.testing.assert_allclose(apply(with_few, variables), expected[key], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(apply(model, variables), expected[key], rtol=1e-4, atol=1e-4)
    assert np.abs(expected["1"] - expected["0"]).max() > 1e-2
    closed, _ = selconv_jax.reallocate(after, jax.random.key(1), AllocationRule(threshold=0.3, top_k=0))
    counts = []
    for _ in range(2):
        small, small_variables = selconv_jax.compact(model, closed, x)
        np.testing.assert_allclose(
            small.apply(small_variables, x, False), apply(model, closed), rtol=1e-4, atol=1e-4
        )
        counts.append(selconv_jax.analysis.count_layers(model, closed, x))
    assert counts[0] == counts[1]
    paths = [layer.path for layer in counts[0]]
    assert paths == ["pointwise0", "block0/conv", "pointwise1", "block1/conv"]
