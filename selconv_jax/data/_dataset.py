"""Data sets in memory: splits of equally sized uint8 images, and their facts."""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from selconv_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """Facts of a data set: shapes, classes, normalization and augmentation.

    Attributes:
        name: The name it was loaded by.
        image_shape: ``(height, width, channels)`` of every image.
        num_classes: Number of classes.
        class_names: One name per class in the order of the labels, or ``None`` if unknown.
        mean: Per-channel mean for normalization, as fractions of 255.
        std: Per-channel standard deviation for normalization, as fractions of 255.
        crop_padding: Pixels of black border from which training crops are taken; 0 for no crop.
        flip: Whether training images are mirrored left to right half of the time.
        eval_resize: For a set of images that differ in size: test images are resized to this shorter
            side and cropped to ``image_shape`` in the centre, training images are random crops resized
            to ``image_shape``. ``None``: all images have ``image_shape``.

    Raises:
        DataError: If the facts are inconsistent.

    Example:
        >>> from selconv_jax.data import DatasetInfo
        >>> info = DatasetInfo("toy", (8, 8, 1), 2, ("a", "b"), (0.5,), (0.25,), 1, True)
        >>> info.image_shape
        (8, 8, 1)
    """

    name: str
    image_shape: tuple[int, int, int]
    num_classes: int
    class_names: tuple[str, ...] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_padding: int
    flip: bool
    eval_resize: int | None = None

    def __post_init__(self) -> None:
        if len(self.image_shape) != 3 or min(self.image_shape) < 1:
            raise DataError(
                f"{self.name}: image_shape is {self.image_shape}; "
                "expected (height, width, channels), all positive."
            )
        if self.num_classes < 1:
            raise DataError(f"{self.name}: num_classes is {self.num_classes}; expected 1 or more.")
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise DataError(
                f"{self.name}: {len(self.class_names)} class_names for {self.num_classes} classes; "
                "give one per class, or None."
            )
        channels = self.image_shape[2]
        for key, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != channels:
                raise DataError(
                    f"{self.name}: {key} has {len(values)} values for {channels} channels; "
                    "give one per channel."
                )
        if not all(value > 0 for value in self.std):
            raise DataError(f"{self.name}: std is {self.std}; every value must be above 0.")
        if self.crop_padding < 0:
            raise DataError(
                f"{self.name}: crop_padding is {self.crop_padding}; expected 0 (no crop) or more."
            )
        if self.eval_resize is not None and self.eval_resize < max(self.image_shape[:2]):
            raise DataError(
                f"{self.name}: eval_resize is {self.eval_resize}, less than the image_shape "
                f"{self.image_shape} that is taken from it."
            )


@dataclasses.dataclass(frozen=True)
class Split:
    """Images with their labels.

    Attributes:
        images: uint8 ``[N, H, W, C]``.
        labels: int32 ``[N]``, counted from 0.

    Raises:
        DataError: A dtype or shape differs from these, or the two lengths differ.

    Example:
        >>> import numpy as np
        >>> from selconv_jax.data import Split
        >>> split = Split(np.zeros((5, 8, 8, 1), np.uint8), np.zeros(5, np.int32))
        >>> len(split)
        5
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int32]

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != np.uint8 or images.ndim != 4:
            raise DataError(f"images are {images.dtype}{list(images.shape)}; expected uint8 [N, H, W, C].")
        if labels.dtype != np.int32 or labels.shape != images.shape[:1]:
            raise DataError(
                f"labels are {labels.dtype}{list(labels.shape)} for {len(images)} images; "
                f"expected int32 [{len(images)}]."
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        """Return an image uint8 ``[H, W, C]`` and its label."""
        return self.images[index], int(self.labels[index])

    def take(self, places: NDArray[np.int64]) -> "Split":
        """Select images and labels by index, int64 ``[M]``."""
        return Split(self.images[places], self.labels[places])


@dataclasses.dataclass(frozen=True)
class ImageData:
    """A data set: its facts and its splits.

    Attributes:
        info: The facts.
        train: The training split.
        test: The test split.
        validation: Images for choosing the best epoch, disjoint from the other splits; or None.

    Raises:
        DataError: If a split is empty, its images have another shape than ``info.image_shape``,
            or a label is outside ``0 .. info.num_classes - 1``.
    """

    info: DatasetInfo
    train: Split
    test: Split
    validation: Split | None = None

    def __post_init__(self) -> None:
        for key in ("train", "test", "validation"):
            split: Split | None = getattr(self, key)
            if split is None:
                continue
            where = f"{self.info.name}, {key} split"
            if not len(split):
                raise DataError(f"{where}: there are no images.")
            if split.images.shape[1:] != self.info.image_shape:
                raise DataError(
                    f"{where}: images are {split.images.shape[1:]}; expected {self.info.image_shape}."
                )
            check_labels(where, split.labels, self.info.num_classes)


def check_labels(where: str, labels: NDArray[np.int32], num_classes: int) -> None:
    """Raise a `DataError` for labels int32 ``[N]`` that are not classes, as of unlabelled images (-1)."""
    low, high = int(labels.min()), int(labels.max())
    if low >= 0 and high < num_classes:
        return
    remedy = ""
    if low == -1:
        remedy = (
            " Images without labels (-1) are of no use here: name others by data.test_split (such as "
            "'validation', or 'train[90%:]' with data.train_split = 'train[:90%]'), and data.validation or "
            "data.validation_split for those that the best epoch is chosen on."
        )
    raise DataError(f"{where}: labels run from {low} to {high}; expected 0 to {num_classes - 1}.{remedy}")
