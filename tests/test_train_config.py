"""Configurations: what is accepted, and what an error names."""

import dataclasses

import pytest

from selconv_jax import ConfigError
from selconv_jax.train.config import Config, dump_config, load_config, parse_config


def test_defaults_are_the_published_ones():
    config = parse_config({})
    assert (config.epochs, config.batch_size) == (300, 64)
    assert config.optimizer.learning_rate == 0.1
    assert (config.optimizer.weight_decay, config.optimizer.shift_weight_decay) == (1e-4, 1e-5)
    allocation = config.allocation.allocation
    assert (allocation.threshold, allocation.top_k, allocation.max_copies) == (1e-3, 3, None)
    assert config.allocation.schedule.until == 0.5


def test_file_and_overrides(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('epochs = 3\n[model]\nname = "densenet100"\n[allocation]\nmax_copies = 32\n')
    config = load_config(
        file,
        ["epochs=5", "model.dtype=bfloat16", "model.options.blocks=[1, 2]", "allocation.max_copies=none"],
    )
    assert config.epochs == 5
    assert config.model.name == "densenet100"
    assert config.model.dtype == "bfloat16"
    assert config.model.options == {"blocks": [1, 2]}
    assert config.allocation.max_copies is None


def test_dump_reads_back(tmp_path):
    config = parse_config(
        {"epochs": 7, "description": 'a "quoted" word', "model": {"options": {"blocks": [1, 2]}}}
    )
    file = tmp_path / "config.toml"
    file.write_text(dump_config(config))
    assert load_config(file) == config


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"epoch": 3}, "unknown configuration key 'epoch'. Did you mean 'epochs'?"),
        ({"modle": {}}, "unknown configuration key 'modle'. Did you mean 'model'?"),
        (
            {"optimizer": {"learning_rat": 1}},
            "unknown configuration key 'optimizer.learning_rat'. Did you mean 'learning_rate'?",
        ),
        ({"threshold": 0.1}, "unknown configuration key 'threshold'. Did you mean 'allocation.threshold'?"),
        ({"epochs": 0}, "epochs is 0; it must be at least 1"),
        ({"epochs": 2.5}, "configuration key 'epochs': Expected `int`, got `float`"),
        ({"batch_size": "64"}, "configuration key 'batch_size': Expected `int`, got `str`"),
        ({"batch_size": True}, "configuration key 'batch_size': Expected `int`, got `bool`"),
        ({"seed": -1}, "seed is -1"),
        ({"checkpoint_minutes": 0}, "checkpoint_minutes is 0"),
        ({"model": 3}, "configuration key 'model'"),
        ({"model": {"variant": "fancy"}}, "configuration key 'model.variant': Invalid enum value 'fancy'"),
        ({"data": {"crop_padding": -1}}, "data.crop_padding is -1; it must be at least 0"),
        ({"data": {"workers": -1}}, "data.workers is -1; it must be at least 0"),
        ({"data": {"mixup": -0.5}}, "data.mixup is -0.5; it must be at least 0"),
        ({"data": {"streaming": 1}}, "configuration key 'data.streaming': Expected `bool | null`"),
        ({"allocation": {"threshold": 1.5}}, "threshold is 1.5; it must be in [0, 1]"),
        ({"allocation": {"until": 2.0}}, "until is 2.0"),
        ({"allocation": {"every": 0}}, "every is 0"),
        ({"optimizer": {"learning_rate": 0.0}}, "optimizer.learning_rate is 0.0; it must be above 0"),
        ({"optimizer": {"momentum": 1.0}}, "optimizer.momentum is 1.0"),
        ({"optimizer": {"weight_decay": -1e-4}}, "optimizer.weight_decay is -0.0001"),
    ],
)
def test_wrong_keys_and_values_are_named(tree, message):
    with pytest.raises(ConfigError) as caught:
        parse_config(tree)
    assert message in str(caught.value)


@pytest.mark.parametrize("override", ["epochs", "=3", "model..name=x", "epochs.more=3"])
def test_wrong_overrides_are_named(tmp_path, override):
    file = tmp_path / "run.toml"
    file.write_text("epochs = 3\n")
    with pytest.raises(ConfigError, match="override"):
        load_config(file, [override])


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no configuration file .*none.toml"):
        load_config(tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("epochs = = 3")
    with pytest.raises(ConfigError, match=r"broken.toml is not a TOML file"):
        load_config(broken)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().epochs = 3
