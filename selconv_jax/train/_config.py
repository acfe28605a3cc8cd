"""The configuration of a run: frozen dataclasses, read from TOML, checked when constructed."""

import dataclasses
import math
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import tomli_w
from flax import traverse_util

from selconv_jax.data._splits import SplitChoice
from selconv_jax.errors import ConfigError, check_value
from selconv_jax.train._config_keys import check_keys
from selconv_jax.train._config_text import apply_override, hint, remedy
from selconv_jax.transforms._rule import AllocationRule
from selconv_jax.transforms._schedule import ReallocationSchedule


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """``[model]``: which network, and in which variant.

    Attributes:
        name: A name of `selconv_jax.models.MODELS`.
        variant: ``"selective"``, ``"plain"``, or ``"gate_only"`` (channels are closed, never filled).
        dtype: Type of the computation; parameters, statistics and the loss stay float32.
        options: Arguments of the network that replace those of its name, such as ``blocks`` or ``growth``.
    """

    name: str = "densenet40"
    variant: Literal["selective", "plain", "gate_only"] = "selective"
    dtype: Literal["float32", "bfloat16"] = "float32"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """``[data]``: the images, and their augmentation in training.

    Attributes:
        name: A name of ``selconv data list``, or of any prepared tensorflow-datasets image set.
        directory: tensorflow-datasets directory; None: its default.
        crop_padding: Zero padding in pixels before the random crop; None: that of the data set.
        flip: Whether to flip half of the images; None: that of the data set.
        streaming: Whether images are read while they are used, one step per call of the compiled program,
            instead of lying on the devices; None: if they differ in size or would take more than 2 GiB.
        workers: Processes that read streamed images; 0: threads of the program.
        mixup: Parameter of the beta distribution of mixup's weights; 0: no mixup.
        validation: Training images to hold out, by which the best epoch is chosen: a number, or a fraction in
            (0, 1). The same number from each class, and the same images for every seed; None: none.
        validation_split: Images of the set to validate on instead, in tensorflow-datasets' slicing syntax,
            such as ``"validation"`` or ``"train[80%:]"``.
        train_split: Images to train on, such as ``"train[:80%]"``; None: ``"train"``.
        test_split: Images to test on; None: ``"test"``, or ``"validation"`` of a set without that.
    """

    name: str = "fashion_mnist_sample"
    directory: str | None = None
    crop_padding: int | None = None
    flip: bool | None = None
    streaming: bool | None = None
    workers: int = 0
    mixup: float = 0.0
    validation: int | float | None = None
    validation_split: str | None = None
    train_split: str | None = None
    test_split: str | None = None

    def __post_init__(self) -> None:
        check_value("data.workers", self.workers, self.workers >= 0, "at least 0 (0: threads)")
        check_value("data.mixup", self.mixup, 0 <= self.mixup < math.inf, "at least 0 (0: off)")
        padding = self.crop_padding
        check_value("data.crop_padding", padding, padding is None or padding >= 0, "at least 0")
        if self.validation is not None:
            valid = 0 < self.validation < 1 if isinstance(self.validation, float) else self.validation >= 1
            bounds = "a whole number of images, at least 1, or a fraction of them above 0 and below 1"
            check_value("data.validation", self.validation, valid, f"{bounds} (leave it out for none)")
        if self.validation is not None and self.validation_split is not None:
            raise ConfigError(
                f"data.validation is {self.validation} and data.validation_split {self.validation_split!r}: "
                "images to validate on are either held out or named. Leave out one of the two."
            )

    @property
    def has_validation(self) -> bool:
        """True if there are validation images, by which the best epoch is chosen."""
        return self.validation is not None or self.validation_split is not None

    @property
    def source(self) -> tuple[str, str | None, bool | None, SplitChoice]:
        """Arguments of `selconv_jax.data.open_data`."""
        splits = SplitChoice(self.train_split, self.test_split, self.validation_split, self.validation)
        return self.name, self.directory, self.streaming, splits


@dataclasses.dataclass(frozen=True)
class AllocationConfig:
    """``[allocation]``: see `selconv_jax.AllocationRule` and `selconv_jax.ReallocationSchedule`.

    Attributes:
        threshold: Fraction of the damage that a round may lose by closing channels, in [0, 1].
        top_k: Number of channels that compete for the closed slots.
        max_copies: Sources that more than this many channels read are not copied again, nor are their
            copies; None: no limit.
        shift_range: New copies start at shifts in ``[-shift_range, shift_range]`` pixels.
        random_sources: Sources are drawn from all open channels instead of the top K: an ablation.
        until: Fraction of the epochs after which the allocation is frozen.
        every: Epochs from one round to the next.
        every_steps: Steps from one round to the next, instead of epochs; None: epochs.
        reset_momentum: Reset the optimizer's state of the rewritten entries; the published method does not.
        compile_frozen: Once the allocation is frozen, compile the steps for only what it uses. Results
            agree up to rounding; statistics of closed channels, which nothing reads, are no longer updated.
    """

    threshold: float = 1e-3
    top_k: int = 3
    max_copies: int | None = None
    shift_range: float = 1.5
    random_sources: bool = False
    until: float = 0.5
    every: int = 1
    every_steps: int | None = None
    reset_momentum: bool = False
    compile_frozen: bool = True

    def __post_init__(self) -> None:
        _ = self.rule, self.schedule  # their constructors check the values

    @property
    def rule(self) -> AllocationRule:
        """The rule by which a round closes and refills channels."""
        names = [field.name for field in dataclasses.fields(AllocationRule)]
        return AllocationRule(**{name: getattr(self, name) for name in names})

    @property
    def schedule(self) -> ReallocationSchedule:
        """The schedule of the rounds."""
        return ReallocationSchedule(self.until, self.every, self.every_steps)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """``[optimizer]``: by default SGD as published (method, "Schedule and training").

    Attributes:
        name: A function of optax or optax.contrib that makes an optimizer from a learning rate, such as
            ``"lars"``.
        options: Its further arguments.
        learning_rate: At the first step, or after the warm-up; decays to 0 by a cosine over the run's steps.
        reference_batch_size: Batch size that ``learning_rate`` is meant for: the rate is multiplied by
            ``batch_size / reference_batch_size``. None: no scaling, as published.
        warmup_epochs: Epochs over which the rate rises from 0. The method has none.
        momentum: Nesterov momentum, of ``"sgd"`` and ``"lars"``.
        weight_decay: Times the parameter, added to the gradient of all parameters but the shifts. If the
            optimizer has its own ``weight_decay``, as adamw has, this value is passed to it instead.
        shift_weight_decay: The same for the shifts.
        train_shift: Whether shifts are trained; false leaves them as drawn.
    """

    name: str = "sgd"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    learning_rate: float = 0.1
    reference_batch_size: int | None = None
    warmup_epochs: float = 0.0
    momentum: float = 0.9
    weight_decay: float = 1e-4
    shift_weight_decay: float = 1e-5
    train_shift: bool = True

    def __post_init__(self) -> None:
        size = self.reference_batch_size
        check_value("optimizer.learning_rate", self.learning_rate, self.learning_rate > 0, "above 0")
        check_value("optimizer.reference_batch_size", size, size is None or size >= 1, "at least 1")
        check_value("optimizer.momentum", self.momentum, 0 <= self.momentum < 1, "in [0, 1)")
        for name in ("warmup_epochs", "weight_decay", "shift_weight_decay"):
            value = getattr(self, name)
            check_value(f"optimizer.{name}", value, 0 <= value < math.inf, "at least 0")


@dataclasses.dataclass(frozen=True)
class Config:
    """Configuration of a run, as a TOML file holds it.

    Attributes:
        description: Purpose of the run, in one sentence.
        epochs: Passes over the training images. Those that do not fill a batch, others in each pass, are
            dropped.
        batch_size: Images per step, over all devices.
        eval_batch_size: Images per evaluation step, over all devices.
        seed: Seed of all random numbers.
        checkpoint_minutes: A checkpoint is written after each epoch, and within an epoch after this many
            minutes without one.
        keep_checkpoints: Number of latest checkpoints that are kept besides the best.
        steps_per_dispatch: Training steps per call of the compiled program; 0: chosen by the backend.
        devices: Number of devices to use, over all processes; 0: all.
        batch_norm: ``"global"``: statistics of the whole batch; ``"per_device"``: each device normalizes with
            those of its own images, which saves collectives in every layer.
        micro_batches: Gradient accumulation: parts of a batch that are computed one after the other, each
            with its own batch statistics, for batches that do not fit in memory at once.
        parameter_shards: Number of shards of the kernels and their optimizer state, over devices of one
            process, for networks that do not fit in the memory of one device.
        tracker: What gets the numbers of each epoch besides ``metrics.jsonl`` and TensorBoard: ``"wandb"``,
            ``"mlflow"``, or a function as ``"MODULE:FUNCTION"``; none: nothing.
        model: ``[model]``.
        data: ``[data]``.
        allocation: ``[allocation]``.
        optimizer: ``[optimizer]``.

    Example:
        >>> from selconv_jax.train import Config, OptimizerConfig
        >>> config = Config(epochs=20, optimizer=OptimizerConfig(learning_rate=0.05))
        >>> config.allocation.threshold, config.model.variant
        (0.001, 'selective')
    """

    description: str = ""
    epochs: int = 300
    batch_size: int = 64
    eval_batch_size: int = 500
    seed: int = 0
    checkpoint_minutes: float = 10.0
    keep_checkpoints: int = 3
    steps_per_dispatch: int = 0
    devices: int = 0
    batch_norm: Literal["global", "per_device"] = "global"
    micro_batches: int = 1
    parameter_shards: int = 1
    tracker: str | None = None
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    allocation: AllocationConfig = dataclasses.field(default_factory=AllocationConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        for key, value in traverse_util.flatten_dict(dataclasses.asdict(self), sep=".").items():
            if isinstance(value, float) and ".options." not in key:
                check_value(key, value, math.isfinite(value), "finite")
        positive = ("epochs", "batch_size", "eval_batch_size", "keep_checkpoints")
        for name in (*positive, "micro_batches", "parameter_shards"):
            check_value(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("steps_per_dispatch", "devices"):
            check_value(name, getattr(self, name), getattr(self, name) >= 0, "at least 0 (0: chosen for you)")
        warmup, bounds = self.optimizer.warmup_epochs, f"below the {self.epochs} epochs of the run"
        check_value("optimizer.warmup_epochs", warmup, warmup < self.epochs, bounds)
        check_value("seed", self.seed, 0 <= self.seed < 2**32, "in [0, 2**32)")
        check_value("checkpoint_minutes", self.checkpoint_minutes, self.checkpoint_minutes > 0, "above 0")


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file and apply overrides.

    Args:
        path: The file.
        overrides: ``"key=value"`` with dots between the parts of the key and the value in TOML; a value that
            is not TOML is read as a number or boolean in Python's notation, or else as text, and ``none``
            removes the key.

    Returns:
        The checked configuration; ``data.directory`` is absolute.

    Raises:
        ConfigError: The file is missing or not TOML, or a key or value is wrong; the message names it.

    Example:
        >>> from pathlib import Path
        >>> from selconv_jax.train import load_config
        >>> size = Path("first.toml").write_text("epochs = 20")
        >>> config = load_config("first.toml", ["optimizer.learning_rate=0.05"])
        >>> config.epochs, config.optimizer.learning_rate
        (20, 0.05)
    """
    text = ""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # some editors begin a file with a mark
        tree = tomllib.loads(text)
    except FileNotFoundError:
        raise ConfigError(f"there is no configuration file {os.fspath(path)}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{os.fspath(path)} is not a TOML file: {error}.{hint(text, error)}") from None
    except OSError as error:
        raise ConfigError(f"{os.fspath(path) or '.'} cannot be read: {error.strerror}.") from None
    return _overridden(tree, overrides)


def override_config(config: Config, overrides: Sequence[str]) -> Config:
    """Apply overrides to a configuration as `load_config` does."""
    return _overridden(_without_none(dataclasses.asdict(config)), overrides)


def parse_config(tree: Mapping[str, Any]) -> Config:
    """Check a nested mapping, as TOML gives it, and make a `Config` of it; missing keys take their defaults.

    Example:
        >>> parse_config({"epoch": 3})
        Traceback (most recent call last):
        ...
        selconv_jax.errors.ConfigError: unknown configuration key 'epoch'. Did you mean 'epochs'?
    """
    check_keys(tree, Config)
    try:
        return msgspec.convert(tree, Config)
    except msgspec.ValidationError as error:
        message, _, path = str(error).rpartition(" - at ")
        where = path.strip("`").removeprefix("$.") if message else ""
        text = f"configuration key {where!r}: {message}" if where else str(error)
        raise ConfigError(f"{text.rstrip('.')}.{remedy(text)}") from None


def dump_config(config: Config) -> str:
    """Write a configuration as TOML with every key; keys that are None are left out."""
    return tomli_w.dumps(_without_none(dataclasses.asdict(config)))


def _without_none(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    return {key: _without_none(value) for key, value in tree.items() if value is not None}


def _overridden(tree: dict[str, Any], overrides: Sequence[str]) -> Config:
    for override in overrides:
        apply_override(tree, override)
    config = parse_config(tree)
    directory = config.data.directory
    if directory is None or "://" in directory:
        return config
    # The run may be resumed from any other directory.
    data = dataclasses.replace(config.data, directory=os.fspath(Path(directory).expanduser().absolute()))
    return dataclasses.replace(config, data=data)
