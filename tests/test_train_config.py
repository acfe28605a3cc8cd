"""Configurations: what is accepted, and what an error names."""

import dataclasses

import pytest

from selconv_jax import CheckpointError, ConfigError
from selconv_jax.train._config import Config, dump_config, load_config, parse_config
from selconv_jax.train._config_changes import check_origin, origin_of, with_changes


def test_defaults_are_the_published_ones():
    config = parse_config({})
    assert (config.epochs, config.batch_size) == (300, 64)
    assert config.optimizer.learning_rate == 0.1
    assert (config.optimizer.weight_decay, config.optimizer.shift_weight_decay) == (1e-4, 1e-5)
    rule = config.allocation.rule
    assert (rule.threshold, rule.top_k, rule.max_copies) == (1e-3, 3, None)
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


@pytest.mark.parametrize(
    ("text", "value"),
    [(".001", 0.001), ("1.", 1.0), ("1e-3", 0.001), ("+.5e1", 5.0), ("007", 7), (" 2 ", 2), ("1_0", 10)],
)
def test_numbers_as_people_write_them(tmp_path, text, value):
    file = tmp_path / "run.toml"
    file.touch()
    found = load_config(file, [f"optimizer.learning_rate={text}", "data.flip=True"])
    assert found.optimizer.learning_rate == value
    assert found.data.flip is True


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "epochs=1e0",
            "'epochs': Expected `int`, got `float`. Write a whole number without dot and exponent",
        ),
        ("epochs=1.", "Write a whole number without dot and exponent, such as 10."),
        (
            "optimizer.learning_rate=0,1",
            "Expected `float`, got `str`. Write a number, such as 0.001 or 1e-3.",
        ),
        ("data.flip=yes", "Expected `bool | null`, got `str`. Write true or false."),
        ("description=5", "Expected `str`, got `int`. Write the text in double quotes"),
        ("optimizer.learning_rate=inf", "optimizer.learning_rate is inf; it must be finite"),
        ("optimizer.learning_rate=nan", "optimizer.learning_rate is nan; it must be above 0"),
        ("checkpoint_minutes=inf", "checkpoint_minutes is inf; it must be finite"),
        ("allocation.shift_range=inf", "shift_range is inf; it must be"),
    ],
)
def test_what_is_no_such_number_says_how_to_write_one(tmp_path, override, said):
    file = tmp_path / "run.toml"
    file.touch()
    with pytest.raises(ConfigError) as caught:
        load_config(file, [override])
    assert said in str(caught.value)


def test_numbers_of_a_file_that_are_no_toml(tmp_path):
    file = tmp_path / "run.toml"
    for line in ("learning_rate = .5", "learning_rate = 5. # high"):
        file.write_text(f"[optimizer]\n{line}\n")
        with pytest.raises(
            ConfigError, match=r"is not a TOML file: .* with a digit on both sides of the dot"
        ):
            load_config(file)
    file.write_text("[optimizer\n")
    with pytest.raises(ConfigError, match="is not a TOML file") as caught:
        load_config(file)
    assert "digit" not in str(caught.value)


def test_the_directory_of_the_images_is_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "run.toml"
    file.touch()
    assert load_config(file, ["data.directory=sets"]).data.directory == str(tmp_path / "sets")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_config(file, ["data.directory=~/sets"]).data.directory == str(tmp_path / "sets")
    assert load_config(file, ["data.directory=gs://bucket/sets"]).data.directory == "gs://bucket/sets"
    assert load_config(file).data.directory is None


@pytest.mark.parametrize(
    ("keep", "override", "free"),
    [
        ([], "devices=1", True),
        ([], "data.directory=/sets", True),
        ([], "eval_batch_size=7", True),
        ([], "seed=1", False),
        ([], "data.train_split=test", False),
        ([], "model.options.growth=4", False),
        (["batch_norm=per_device"], "devices=1", False),  # it says of which images the statistics are
    ],
)
def test_what_may_be_changed_of_a_run_that_has_begun(tmp_path, keep, override, free):
    file = tmp_path / "run.toml"
    file.touch()
    config = load_config(file, keep)
    changed = load_config(file, [*keep, override])
    if free:
        assert with_changes(config, [override]) == changed
        check_origin("here", origin_of(config), origin_of(changed))
        return
    key = override.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"^{key} cannot be changed"):
        with_changes(config, [override])
    with pytest.raises(CheckpointError, match=rf"has been changed since here was saved: {key} was .* and is"):
        check_origin("here", origin_of(config), origin_of(changed))


def test_origins_of_versions_with_other_keys():
    """A key that did not exist when a checkpoint was saved counts as its default."""
    origin = origin_of(parse_config({}))
    older = {key: value for key, value in origin.items() if key != "micro_batches"}
    check_origin("here", older, origin)
    with pytest.raises(CheckpointError, match="micro_batches was not set and is 2"):
        check_origin("here", older, origin_of(parse_config({"micro_batches": 2})))
    check_origin("here", {}, origin)  # not known


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


@pytest.mark.parametrize(("tree", "key"), [({"growth": 4}, "growth"), ({"model": {"blocks": [1]}}, "blocks")])
def test_an_option_of_a_network_outside_its_place(tree, key):
    """`selconv bench` takes it as such."""
    with pytest.raises(ConfigError, match=rf"Did you mean 'model\.options\.{key}'\?"):
        parse_config(tree)


def test_a_byte_order_mark_at_the_beginning(tmp_path):
    path = tmp_path / "marked.toml"
    path.write_bytes(b"\xef\xbb\xbfepochs = 7\n")
    assert load_config(path).epochs == 7
