"""Steps of every configuration: shapes at full size, and two steps that are run."""

import contextlib
import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selconv_jax.data._catalog import KNOWN
from selconv_jax.data._dataset import ImageData, Split
from selconv_jax.train._step import train_step
from selconv_jax.train._trainer import Trainer
from test_experiments import CONFIGS

pytestmark = pytest.mark.optimized


def distinct(key, paths=CONFIGS):
    """The first configuration for every value of ``key``."""
    first = {}
    for path in paths:
        first.setdefault(key(CONFIGS[path]), path)
    return first


def program(config):
    """What the shapes of a step depend on."""
    return (config.model.name, config.model.variant, repr(config.model.options), config.data)


def fake_trainer(config, batch_size=2, **options):
    """A trainer on fake images of the shape and number of classes of the data set."""
    info = KNOWN[config.data.name].info()
    random = np.random.default_rng(0)
    splits = [
        Split(
            random.integers(0, 256, (2 * batch_size, *info.image_shape), np.uint8),
            random.integers(0, info.num_classes, 2 * batch_size, np.int32),
        )
        for _ in range(2)
    ]
    model = dataclasses.replace(config.model, options={**config.model.options, **options})
    small = dataclasses.replace(
        config,
        batch_size=batch_size,
        eval_batch_size=batch_size,
        devices=1,
        steps_per_dispatch=1,
        model=model,
    )
    return Trainer(small, ImageData(info, *splits))


# Tracing a training step of these takes more than some seconds.
DEEP = ("densenet100", "densenet121", "densenet_bc190", "preresnet164", "condensenet182")


@pytest.mark.parametrize("name", DEEP)
def test_deep_network_is_built(name):
    path = next(path for path, config in CONFIGS.items() if config.model.name == name)
    state = fake_trainer(CONFIGS[path]).state_shape()
    classes = KNOWN[CONFIGS[path].data.name].num_classes
    assert state.params["classifier"]["linear"]["bias"].shape == (classes,)


def _takes_long(config):
    """A deep network, or one that differs from a quicker one in its images alone."""
    return config.model.name in DEEP or config.data.name not in ("cifar10", "imagenet2012")


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=pytest.mark.slow if _takes_long(CONFIGS[path]) else ())
        for path in distinct(program).values()
    ],
)
def test_full_size_step_has_the_right_shapes(path):
    """A step of the whole network on a whole batch, evaluated by shapes alone."""
    config = CONFIGS[path]
    info = KNOWN[config.data.name].info()
    trainer = fake_trainer(config)
    stems = {28: "cifar", 32: "cifar", 64: "tiny_imagenet", 224: "imagenet"}
    assert trainer.model.stem == config.model.options.get("stem", stems[info.image_shape[0]])
    state = trainer.state_shape()
    assert state.params["classifier"]["linear"]["bias"].shape == (info.num_classes,)
    assert bool(state.selectivity) == (config.model.variant != "plain")
    step = functools.partial(
        train_step,
        model=trainer.model.clone(capacity=0.0),
        optimizer=trainer.optimizer,
        info=info,
        steps_per_epoch=2,
        mixup=config.data.mixup,
    )
    after = jax.eval_shape(
        step,
        state,
        jax.ShapeDtypeStruct((config.batch_size, *info.image_shape), jnp.uint8),
        jax.ShapeDtypeStruct((config.batch_size,), jnp.int32),
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


# Options that leave a few layers of every kind.
SMALL = {
    "densenet": {"blocks": [1, 1], "growth": 4},
    "preresnet": {"blocks": [1, 1], "width": 4},
    "resnext": {"blocks": [1, 1], "groups": 2, "base_width": 4, "widen": 1},
    "condensenet": {"blocks": [1, 1], "growth": [4, 8], "groups": 2},
    "pointwise": {"blocks": [1, 1], "widths": [4, 8]},
}


def family(config):
    return config.model.name.rstrip("0123456789").removesuffix("_bc")


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    # Selective where there is a choice: its network has every part of the plain one.
    distinct(
        lambda config: (family(config), config.data.name, config.data.mixup),
        [path for path, config in CONFIGS.items() if config.model.variant != "plain"],
    ).values(),
)
def test_two_steps_of_a_small_network_run(path):
    config = CONFIGS[path]
    run_two_steps(fake_trainer(config, **SMALL[family(config)]))


# Networks of which two steps at their full size take seconds; the others' are held to their shapes above.
RUN_AT_FULL_SIZE = ("densenet40", "densenet100", "preresnet164")


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    distinct(
        lambda config: (repr(config.model), config.data.name),
        [path for path, config in CONFIGS.items() if config.model.name in RUN_AT_FULL_SIZE],
    ).values(),
)
def test_two_steps_at_full_size_run(path):
    run_two_steps(fake_trainer(CONFIGS[path]))


def run_two_steps(trainer):
    state = trainer.initial_state()
    before = jax.device_get(state.params)
    with contextlib.closing(trainer.batches(state, 0)) as batches:
        for _ in range(2):
            state, numbers = trainer.run_steps(state, batches, trainer.program(state, 0), 1)
    loss, _, failed = jax.device_get(numbers)
    assert int(state.step) == 2
    assert np.isfinite(loss)
    assert not failed
    moved = jax.tree.map(lambda old, new: bool((old != new).any()), before, jax.device_get(state.params))
    assert moved["stem"]["kernel"]
    assert moved["classifier"]["linear"]["kernel"]
    assert int(trainer.evaluate(state).count) == 4
