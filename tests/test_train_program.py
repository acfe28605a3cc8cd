"""What steps are compiled for changes what they cost, not what they compute."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

import selconv_jax
from array_functions import precision
from runs import tiny_config, whole_config
from selconv_jax.data._loading import open_data
from selconv_jax.models import DenseNet, PreResNet
from selconv_jax.train import _network
from selconv_jax.train._config import OptimizerConfig
from selconv_jax.train._network import bucket_program, frozen_program
from selconv_jax.train._optimizer import make_optimizer
from selconv_jax.train._trainer import Trainer

pytestmark = pytest.mark.optimized

STEPS = 20
# So low that no activation comes so near to 0 that rounding decides its sign.
RATE = 0.01
NETWORKS = {
    "densenet": DenseNet(5, (2, 1), growth=4, compression=0.5),
    "preresnet": PreResNet(5, (1, 1), width=4),
}
IMAGES = np.random.default_rng(0).normal(size=(8, 8, 8, 1))
LABELS = np.arange(8, dtype=np.int32) % 5


def trainer_of(config):
    return Trainer(config, open_data(*config.data.source))


def typed(name, dtype):
    return NETWORKS[name].clone(dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype))


def reallocated(model):
    """Variables with copies, and with a closed channel in every layer."""
    variables = model.init(jax.random.key(0), jnp.asarray(IMAGES, model.dtype), train=False)
    rule = selconv_jax.AllocationRule(threshold=0.2)
    variables, _ = selconv_jax.reallocate(variables, jax.random.key(0), rule)
    selectivity = traverse_util.flatten_dict(variables["selectivity"])
    for path, values in selectivity.items():
        if path[-1] == "gate":
            own = np.asarray(selectivity.get((*path[:-1], "source"), np.full(values.shape, -1))) < 0
            selectivity[path] = values & (jnp.arange(values.shape[0]) != np.flatnonzero(own)[0])
    # Copies start with rows of zeros.
    params = jax.tree.map(lambda leaf: leaf + (leaf.ndim > 1) * 0.1 * jnp.cos(leaf), variables["params"])
    return {**variables, "params": params, "selectivity": traverse_util.unflatten_dict(selectivity)}


def losses(model, variables, optimizer, compiled=True):
    """The loss before each of some steps, in the type of the network, and the variables after them."""
    images = jnp.asarray(IMAGES, model.dtype)

    def step(variables, opt_state):
        def loss(params):
            logits, changed = model.apply(
                {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean(), changed

        (value, changed), gradients = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        updates, opt_state = optimizer.update(gradients, opt_state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return {**variables, **changed, "params": params}, opt_state, value

    step = jax.jit(step) if compiled else step
    opt_state, found = optimizer.init(variables["params"]), []
    for _ in range(STEPS):
        variables, opt_state, value = step(variables, opt_state)
        assert value.dtype == model.dtype
        found.append(float(value))
    return np.array(found), variables


def test_a_frozen_allocation_that_cannot_be_compacted_has_room_for_its_copies(monkeypatch, small_densenet):
    nothing = types.SimpleNamespace(model=types.SimpleNamespace(layouts=(), widths=()))
    monkeypatch.setattr(_network, "plan_compaction", lambda *args, **options: nothing)
    model, variables = small_densenet
    frozen = frozen_program(model, variables, jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32))
    assert frozen.model.capacity >= selconv_jax.required_capacity(variables) > 0


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float64", 1e-9)])
@pytest.mark.parametrize("name", NETWORKS)
def test_trajectories_agree(name, dtype, tolerance):
    with precision(np.dtype(dtype).type):
        model, optimizer = typed(name, dtype), make_optimizer(OptimizerConfig(learning_rate=RATE), 100)
        variables = reallocated(model)
        needed = selconv_jax.required_capacity(variables)
        layers = selconv_jax.layer_states(variables).values()
        assert 0 < needed < 1
        assert not all(layer.gate.all() for layer in layers)
        bucket = bucket_program(model, needed)
        frozen = frozen_program(model, variables, jax.ShapeDtypeStruct(IMAGES.shape, model.dtype))
        assert frozen.key[0] == "frozen"
        assert bucket.model.capacity < 1
        expected, after = losses(bucket.model, variables, optimizer)
        assert expected[-1] < expected[0]
        for other in (model.clone(capacity=1.0), frozen.model):
            found, end = losses(other, variables, optimizer)
            np.testing.assert_allclose(found, expected, rtol=tolerance)
            assert jax.tree.structure(end) == jax.tree.structure(after)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_compiled_steps_agree_with_eager_ones(name):
    with precision(np.float64):
        model, optimizer = typed(name, "float64"), make_optimizer(OptimizerConfig(learning_rate=RATE), 100)
        variables = reallocated(model)
        found, _ = losses(bucket_program(model, 1.0).model, variables, optimizer)
        expected, _ = losses(model, variables, optimizer, compiled=False)
        np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_the_program_follows_the_schedule():
    config = whole_config()  # 4 epochs: rounds after the first and the second
    tested = trainer_of(config)
    state = tested.initial_state()
    layer = state.selectivity["block1_layer1"]["conv1"]
    source = np.asarray(layer["source"]).copy()
    source[:2] = 5
    conv1 = {**layer, "source": jnp.asarray(source)}
    block = {**state.selectivity["block1_layer1"], "conv1": conv1}
    copied = dataclasses.replace(state, selectivity={"block1_layer1": block})
    assert [tested.program(copied, epoch).key[0] for epoch in range(4)] == [
        "capacity",
        "capacity",
        "frozen",
        "frozen",
    ]
    assert tested.program(copied, 2) == tested.program(copied, 3)
    # Nothing closed, nothing copied: the plain network's program, already compiled.
    assert tested.program(state, 3) == tested.program(state, 0)
    assert tested.program(state, 0).model.capacity == 0
    unfrozen = trainer_of(tiny_config())
    assert unfrozen.program(copied, 3).key == ("capacity", 0.25)


def test_the_program_follows_from_the_state_alone():
    """Whether one asks before the first step of an epoch, after a round within it, or having resumed it."""
    config = tiny_config(allocation={"compile_frozen": True, "every_steps": 3, "until": 0.6})
    tested = trainer_of(config)  # 4 steps an epoch, rounds after 3, 6 and 9
    state = tested.initial_state()
    layer = state.selectivity["block1_layer1"]["conv1"]
    conv1 = {**layer, "source": jnp.asarray(layer["source"]).at[:2].set(5)}
    selectivity = {"block1_layer1": {**state.selectivity["block1_layer1"], "conv1": conv1}}

    def kind(step, epoch):
        at = dataclasses.replace(state, step=jnp.int32(step), selectivity=selectivity)
        return tested.program(at, epoch).key[0]

    assert [kind(step, step // 4) for step in range(16)] == ["capacity"] * 9 + ["frozen"] * 7
    # The evaluation after an epoch computes what its last steps did: a round at its end comes later.
    assert [kind(4 * (epoch + 1), epoch) for epoch in range(4)] == [
        "capacity",
        "capacity",
        "frozen",
        "frozen",
    ]
    by_epoch = trainer_of(whole_config())
    after = dataclasses.replace(state, step=jnp.int32(8), selectivity=selectivity)
    assert by_epoch.program(after, 1).key[0] == "capacity"
    assert by_epoch.program(after, 2).key[0] == "frozen"
