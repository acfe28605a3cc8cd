"""Runs tried on shapes: what cannot be trained is refused before anything is made."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

from runs import quiet_console, tiny_config
from selconv_jax.errors import ConfigError
from selconv_jax.train._config import ModelConfig
from selconv_jax.train._loop import train_run
from selconv_jax.train._network import make_network
from selconv_jax.train._optimizer import make_optimizer
from selconv_jax.train._state import initial_state
from selconv_jax.train._trial import notes_on, try_on_shapes

SHAPE = (8, 8, 1)


@pytest.fixture(autouse=True)
def _promotion():
    with jax.numpy_dtype_promotion("standard"):  # some of optax's own code mixes types
        yield


def run_of(shape=SHAPE, **changes):
    config = tiny_config(**changes)
    network = make_network(config.model, shape, 10)
    return config, network, make_optimizer(config.optimizer, 10), shape


def test_the_state_is_that_of_the_first_step():
    config, network, optimizer, shape = run_of()
    wanted = jax.eval_shape(lambda: initial_state(network, optimizer, shape, 0))
    assert try_on_shapes(config, network, optimizer, shape) == wanted


@pytest.mark.parametrize(
    "name", ["sgd", "adamw", "lamb", "adafactor", "muon", "contrib.prodigy", "optax.lion"]
)
def test_optimizers_that_train(name):
    state = try_on_shapes(*run_of(optimizer={"name": name}))
    assert len(jax.tree.leaves(state.opt_state)) > 0


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars", "muon"])
def test_optimizers_that_can_be_reset(name):
    run = run_of(optimizer={"name": name}, allocation={"reset_momentum": True})
    assert try_on_shapes(*run).selectivity


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optimizer": {"name": "lbfgs"}}, "optimizer.name is 'lbfgs', which cannot make a step .*'value'"),
        ({"optimizer": {"name": "momo"}}, "optimizer.name is 'momo', which cannot make a step"),
        ({"optimizer": {"name": "sophia"}}, "optimizer.name is 'sophia', which cannot make a step .*obj_fn"),
        ({"optimizer": {"name": "rprop"}}, "optimizer.name is 'rprop', which cannot be used with a learning"),
        ({"optimizer": {"name": "schedule_free_sgd"}}, "whose result is an average of the networks that"),
        (
            {"optimizer": {"name": "schedule_free_adamw", "train_shift": False}},
            "optimizer.name is 'schedule_free_adamw', whose result is an average",
        ),
        (
            {"optimizer": {"name": "adafactor"}, "allocation": {"reset_momentum": True}},
            "allocation.reset_momentum is true, but what adafactor keeps cannot be reset .*conv1/bias",
        ),
        (
            {"optimizer": {"name": "adam", "options": {"mu_dtype": [1]}}},
            "optimizer.name is 'adam', .* or not with these optimizer.options",
        ),
    ],
)
def test_refusals_come_before_the_directory(changes, said, tmp_path):
    console, _ = quiet_console()
    with pytest.raises(ConfigError, match=said):
        train_run(tiny_config(**changes), tmp_path / "run", console)
    assert not list(tmp_path.iterdir())


def test_steps_that_change_the_types_of_their_state_are_refused():
    config, network, optimizer, shape = run_of()
    halving = optax.GradientTransformation(
        lambda params: jnp.zeros((), jnp.int32), lambda updates, state, params: (updates, state / 2)
    )
    with pytest.raises(ConfigError, match="a step changes the types of its state"):
        try_on_shapes(config, network, optax.chain(optimizer, halving), shape)


def test_networks_that_cannot_be_made_are_refused():
    config, _, optimizer, shape = run_of()
    with pytest.raises(ConfigError, match=r"the network cannot be made \(.+\)\. Choose other model.options"):
        try_on_shapes(config, Grouped(), optimizer, shape)


class Grouped(nn.Module):
    @nn.compact
    def __call__(self, images, train):
        return nn.Conv(4, (1, 1), feature_group_count=3)(images)


# Notes


def notes(devices=1, **changes):
    return notes_on(*run_of(**changes), devices)


TWO_POOLS = {"options": {"blocks": [1, 1, 1]}}


@pytest.mark.parametrize(
    ("changes", "devices", "noted"),
    [
        ({"batch_size": 1}, 1, True),
        ({"batch_size": 2}, 1, False),
        ({"batch_size": 2, "micro_batches": 2}, 1, True),
        ({"batch_size": 2}, 2, False),
        ({"batch_size": 2, "batch_norm": "per_device"}, 2, True),
        ({"batch_size": 1, "shape": (8, 8, 1)}, 1, False),
    ],
)
def test_batch_norm_of_a_single_value_is_noted(changes, devices, noted):
    found = notes(devices, **{"shape": (4, 4, 1), "model": TWO_POOLS, **changes})
    said = "in 3 layers, from block3_layer1/conv1 on, batch norm in training sees one pixel at a time"
    assert [note.startswith(said) for note in found] == [True] * noted


@pytest.mark.parametrize(
    ("changes", "noted"),
    [
        ({"optimizer": {"name": "madgrad"}}, True),
        ({"optimizer": {"name": "dog"}}, True),
        ({"optimizer": {"name": "madgrad"}, "allocation": {"reset_momentum": True}}, False),
        ({"optimizer": {"name": "madgrad"}, "model": {"variant": "plain"}}, False),
        ({"optimizer": {"name": "adamw"}}, False),
        ({"optimizer": {"name": "noisy_sgd", "options": {"key": 3}}}, False),
    ],
)
def test_optimizers_that_remember_parameters_are_noted(changes, noted):
    assert any("remembers what parameters were" in note for note in notes(**changes)) == noted


@pytest.mark.parametrize(
    ("name", "rate", "noted"),
    [("prodigy", 0.1, True), ("contrib.cocob", 0.1, True), ("dadapt_adamw", 1.0, False), ("sgd", 0.1, False)],
)
def test_rates_of_optimizers_that_find_their_own_are_noted(name, rate, noted):
    said = f"{name} finds the learning rate itself, and optimizer.learning_rate, which is 0.1, multiplies it"
    found = notes(optimizer={"name": name, "learning_rate": rate})
    assert any(note.startswith(said) for note in found) == noted


def test_notes_are_shown(tmp_path, monkeypatch):
    monkeypatch.setattr("selconv_jax.train._trainer.notes_on", lambda *run: ("[not markup] of a kind.",))
    console, text = quiet_console()
    assert train_run(tiny_config(epochs=1), tmp_path / "run", console) == 0
    assert "note: [not markup] of a kind." in text.getvalue()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"num_classes": 100},
            "model.options.num_classes cannot be set: it is that of the images, see data.name",
        ),
        ({"variant": "plain"}, "model.options.variant cannot be set: it is model.variant"),
        ({"param_dtype": "float16"}, "model.options.param_dtype cannot be set: parameters are float32"),
        ({"dropout_rate": "x"}, "model.options.dropout_rate is 'x'; it must be a number in [0, 1)"),
        ({"dropout_rate": True}, "model.options.dropout_rate is True; it must be a number in [0, 1)"),
        ({"dropout_rate": 1.0}, "model.options.dropout_rate is 1.0; it must be a number in [0, 1)"),
        ({"compression": "x"}, "model.options.compression is 'x'; it must be a number in (0, 1]"),
        ({"growth": True}, "model.options.growth is True; it must be a whole number"),
        ({"growth": 4.0}, "model.options.growth is 4.0; it must be a whole number"),
        ({"blocks": [True]}, "model.options.blocks is (True,); it must be a list of whole numbers"),
        ({"stem": ["cifar"]}, "model.options.stem is ('cifar',)."),
        ({"stem": "cifr"}, "model.options.stem is 'cifr'. Did you mean 'cifar'?"),
    ],
)
def test_options_of_networks_of_another_kind(options, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        make_network(ModelConfig(options=options), SHAPE, 10)
