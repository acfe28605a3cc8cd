"""The section ``[data]`` of a configuration: images, splits and augmentation."""

import dataclasses

from selconv_jax.data._splits import SplitChoice
from selconv_jax.errors import ConfigError, check_value

__all__ = ["DataConfig"]


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
        validation: Training images to hold out, of which the best epoch is chosen: a number, or a fraction in
            (0, 1). As many of each class as of any other, the same ones for every seed; None: none.
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
        check_value("data.mixup", self.mixup, 0 <= self.mixup < float("inf"), "at least 0 (0: off)")
        if self.crop_padding is not None:
            check_value("data.crop_padding", self.crop_padding, self.crop_padding >= 0, "at least 0")
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
