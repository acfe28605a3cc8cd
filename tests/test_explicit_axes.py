"""Transforms of variables on meshes of explicit axes, as alone."""

import chex
import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import selconv_jax
from selconv_jax import AllocationRule, SelectiveConv
from states import perturbed_variables


def on_explicit_axes(tree):
    """The tree with its input channels sharded on a mesh of explicit axes, and the mesh."""
    mesh = jax.make_mesh((2,), ("model",), (AxisType.Explicit,), devices=jax.devices()[:2])
    axes = {4: PartitionSpec(None, None, "model", None), 2: PartitionSpec("model", None)}

    def placed(leaf):
        return jax.device_put(leaf, NamedSharding(mesh, axes.get(leaf.ndim, PartitionSpec("model"))))

    return jax.tree.map(placed, tree), mesh


def assert_same_shardings(new, old):
    for leaf, before in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True):
        assert leaf.sharding.is_equivalent_to(before.sharding, before.ndim)


def test_input_channels_may_be_sharded_on_a_mesh_of_explicit_axes():
    alone = perturbed_variables(SelectiveConv(4, (3, 3)), (2, 6, 6, 16), seed=0)
    placed, mesh = on_explicit_axes(alone)
    optimizer = optax.trace(0.9)

    def run(variables):
        new, report = selconv_jax.reallocate(variables, jax.random.key(0), AllocationRule(threshold=0.3))
        momentum = optimizer.init(variables["params"])
        momentum = jax.tree.map(lambda leaf: leaf + 0.5, momentum)
        return new, selconv_jax.reset_rewritten(optimizer, momentum, new["params"], report), report

    expected, momentum, report = run(alone)
    assert report.reallocated > 0
    with jax.set_mesh(mesh):
        for new, reset, same in (run(placed), jax.jit(run)(placed)):
            assert same == report
            chex.assert_trees_all_equal(new, expected)
            chex.assert_trees_all_equal(reset, momentum)
            assert_same_shardings(new, placed)
            assert_same_shardings(reset.trace, placed["params"])


def test_variables_on_a_mesh_of_explicit_axes_are_compacted():
    layer, x = SelectiveConv(4, (3, 3)), jax.ShapeDtypeStruct((2, 6, 6, 16), jnp.float32)
    alone = perturbed_variables(layer, x.shape, seed=0, closed=0.3, copies=0.3)
    plan = selconv_jax.plan_compaction(layer, alone, x)
    small = plan.take(alone)
    assert small["params"]["kernel"].shape[2] < 16
    doubled = jax.tree.map(lambda leaf: 2 * leaf, small)
    placed, mesh = on_explicit_axes(alone)
    with jax.set_mesh(mesh):
        again = selconv_jax.plan_compaction(layer, placed, x)
        assert again.model == plan.model
        chex.assert_trees_all_equal(again.take(placed), small)
        whole = again.put(placed, doubled)
    chex.assert_trees_all_equal(whole, plan.put(alone, doubled))
    assert_same_shardings(whole, placed)
