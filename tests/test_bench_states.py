"""Allocations made for benchmarks: as many channels as asked for, and the same function as it should be."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selconv_jax import SelectiveConv, layer_states, required_capacity
from selconv_jax._bench.states import with_closed, with_copies, without_allocation
from selconv_jax.models import DenseNet, ResNeXt

IMAGES = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
MODEL = DenseNet(num_classes=3, blocks=(2, 1), growth=5)  # 10 to 20 channels


@pytest.fixture(scope="module")
def variables():
    return MODEL.init(jax.random.key(0), IMAGES, train=False)


def logits(model, variables, train=False):
    mutable = ["batch_stats"] if train else False
    run = jax.jit(lambda variables: model.apply(variables, IMAGES, train=train, mutable=mutable))
    result = run(variables)
    return result[0] if train else result


@pytest.mark.parametrize("share", [0.0, 0.125, 0.3, 0.5, 1.0])
def test_share_of_copies_is_exact(variables, share):
    new = with_copies(variables, share, seed=0)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, variables)
    before = layer_states(variables)
    for name, state in layer_states(new).items():
        assert state.gate.all()
        if state.source is None:
            assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), state, before[name]))
            continue
        channels, copies = len(state.gate), np.asarray(state.source) >= 0
        assert copies.sum() == int(share * channels + 1e-9)
        assert np.abs(state.shift[copies]).max(initial=0.0) <= 1.5
        assert (state.kernel[:, :, copies] == 0).all()
        if share <= 0.5:
            assert not copies[np.asarray(state.source)[copies]].any()  # sources read themselves
    assert required_capacity(new) <= share


@pytest.mark.parametrize("share", [0.125, 0.5, 1.0])
def test_a_step_for_the_share_has_room_for_the_copies(variables, share):
    new = with_copies(variables, share, seed=0)
    # Kernel rows of copies are zero: without them a missing slot would not be seen.
    new["params"] = jax.tree.map(lambda leaf: leaf + 0.1, new["params"])
    ours = logits(MODEL.clone(capacity=share), new, train=True)
    np.testing.assert_allclose(ours, logits(MODEL, new, train=True), rtol=1e-5, atol=1e-5)


def test_copies_follow_from_the_seed(variables):
    one, same, other = (with_copies(variables, 0.5, seed=seed) for seed in (0, 0, 1))
    equal = [
        jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), one["selectivity"], new["selectivity"]))
        for new in (same, other)
    ]
    assert equal == [True, False]


def test_nothing_allocated_is_the_plain_network(variables):
    plain = MODEL.clone(variant="plain")
    bare = without_allocation(variables)
    chex.assert_trees_all_equal_shapes_and_dtypes(bare, plain.init(jax.random.key(0), IMAGES, train=False))
    expected = logits(MODEL, with_copies(variables, 0.0, seed=0))
    np.testing.assert_allclose(logits(plain, bare), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_share_of_closed_channels_is_exact(variables, share):
    new = with_closed(variables, share, seed=0)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, variables)
    for state in layer_states(new).values():
        channels = len(state.gate)
        assert (~state.gate).sum() == min(int(share * channels + 1e-9), channels - 1)
        if state.source is not None:
            assert (state.source == -1).all()


def test_closed_channels_are_zero_rows_of_the_plain_network(variables):
    new = with_closed(variables, 0.5, seed=0)
    bare = without_allocation(new)
    for name, state in layer_states(new).items():
        module = bare["params"]
        for part in name.split("/"):
            module = module[part]
        module["kernel"] = module["kernel"] * state.gate[None, None, :, None].astype(jnp.float32)
    expected = logits(MODEL.clone(variant="plain"), bare)
    np.testing.assert_allclose(logits(MODEL, new), expected, rtol=1e-5, atol=1e-5)
    assert np.abs(logits(MODEL, variables) - expected).max() > 1e-3


def test_every_group_keeps_an_open_channel():
    layer = SelectiveConv(features=6, kernel_size=(3, 3), feature_group_count=3)
    variables = layer.init(jax.random.key(0), jnp.ones((1, 4, 4, 12)), train=False)
    gate = with_closed(variables, 1.0, seed=3)["selectivity"]["gate"]
    assert gate.reshape(3, 4).sum(axis=1).tolist() == [1, 1, 1]


def test_one_channel_copies_itself():
    layer = SelectiveConv(features=2, kernel_size=(1, 1))
    variables = layer.init(jax.random.key(0), jnp.ones((1, 4, 4, 1)), train=False)
    assert with_copies(variables, 1.0, seed=0)["selectivity"]["source"].tolist() == [0]
    assert with_closed(variables, 1.0, seed=0)["selectivity"]["gate"].tolist() == [True]


def test_networks_with_plain_layers_between():
    model = ResNeXt(3, blocks=(1,), groups=2, base_width=2, widen=1)
    variables = model.init(jax.random.key(0), IMAGES, train=False)
    assert 0 < required_capacity(with_copies(variables, 0.25, seed=0)) <= 0.25
