"""Choice of the training, validation and test images of a data set."""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from selconv_jax.errors import DataError, nearest

_SLICE = re.compile(r"(?P<split>[\w-]+)(\[(?P<start>[^:\]]*):(?P<stop>[^:\]]*)\])?")
_BOUNDARY = re.compile(r"-?\d+(\.\d+(?=%))?%?")


@dataclasses.dataclass(frozen=True)
class SplitChoice:
    """Choice of the splits of a run, in the slicing syntax of tensorflow-datasets; None: the default.

    Attributes:
        train: Training images; default ``"train"``.
        test: Test images; default ``"test"``, or ``"validation"`` of a set without it.
        validation: Validation images; by default none.
        held_out: Instead, hold out training images for validation: a number of images, or a fraction of
            them in (0, 1).
    """

    train: str | None = None
    test: str | None = None
    validation: str | None = None
    held_out: int | float | None = None


@dataclasses.dataclass(frozen=True)
class Slice:
    """Consecutive images of a split, from ``start`` up to, but not including, ``stop``."""

    split: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"{self.split}[{self.start}:{self.stop}]"


def resolve_splits(
    name: str, choice: SplitChoice, counts: Mapping[str, int], default_test: Sequence[str]
) -> dict[str, tuple[Slice, ...]]:
    """Resolve a choice of splits to slices of ``"train"``, ``"test"`` and, if it is chosen, ``"validation"``.

    ``counts`` are the numbers of images of every split of the set, and ``default_test`` names of the default
    test split, in order of preference. No image is in two slices.

    Example:
        >>> choice = SplitChoice(train="train[:80%]", validation="train[80%:]")
        >>> found = resolve_splits("toy", choice, {"train": 50, "test": 20}, ["test"])
        >>> {key: str(*slices) for key, slices in found.items()}
        {'train': 'train[0:40]', 'test': 'test[0:20]', 'validation': 'train[40:50]'}
    """
    test = next((key for key in default_test if key in counts), None)
    if (choice.train is None and "train" not in counts) or (choice.test is None and test is None):
        raise DataError(
            f"{name} has the splits {', '.join(sorted(counts)) or 'none'}; it needs train, and "
            f"{' or '.join(default_test)}, or others named by data.train_split and data.test_split."
        )
    texts = {"train": choice.train or "train", "test": choice.test or test, "validation": choice.validation}
    named = {key: text for key, text in texts.items() if text}
    found = {key: slices_of(name, f"data.{key}_split", text, counts) for key, text in named.items()}
    parts = [(key, part) for key, slices in found.items() for part in slices]
    for (key, part), (other_key, other) in itertools.combinations(parts, 2):
        start, stop = max(part.start, other.start), min(part.stop, other.stop)
        if part.split == other.split and start < stop:
            raise DataError(
                f"{name}: data.{key}_split = {named[key]!r} and data.{other_key}_split = "
                f"{named[other_key]!r} share the images {Slice(part.split, start, stop)}. Choose parts "
                "that share none, such as 'train[:90%]' and 'train[90%:]'."
            )
    return found


def slices_of(name: str, key: str, text: str, counts: Mapping[str, int]) -> tuple[Slice, ...]:
    """Parse the slicing syntax of tensorflow-datasets, such as ``"train[:80%]"``; no slice is empty.

    Boundaries are indices or percentages (rounded to the closest index), counted from the end if they
    are negative; ``+`` joins slices. The ``name`` of the set and the configuration ``key`` are for messages.
    """
    slices = []
    for term in text.split("+"):
        parsed = _SLICE.fullmatch(term.strip())
        bounds = [bound.strip() for bound in parsed.group("start", "stop") if bound] if parsed else []
        # As in tensorflow-datasets, "train[:]" is not valid.
        empty = parsed is not None and "[" in term and not bounds
        if parsed is None or empty or not all(_BOUNDARY.fullmatch(bound) for bound in bounds):
            raise DataError(
                f"{name}: {key} = {text!r} is neither a split nor a slice of one. Write it as "
                "'validation', 'train[:80%]', 'train[5000:]' or 'train[-10%:]'."
            )
        split = parsed["split"]
        if split not in counts:
            raise DataError(
                f"{name}: {key} = {text!r}: there is no split {split!r}. {nearest(split, sorted(counts))}"
            )
        count = counts[split]
        if not count:
            raise DataError(f"{name}: the split {split} is empty.")
        start = _place(parsed["start"], 0, count)
        stop = _place(parsed["stop"], count, count)
        if not 0 <= start < stop <= count:
            raise DataError(
                f"{name}: {key} = {text!r}: {term.strip()} is images {start} to {stop} of the {count} of "
                f"{split}, which has none or not all of them. Choose boundaries within 0 and {count}."
            )
        slices.append(Slice(split, start, stop))
    return tuple(slices)


def _place(text: str | None, default: int, count: int) -> int:
    """Return the index of a boundary in a split."""
    text = (text or "").strip()
    if not text:
        return default
    place = round(float(text[:-1]) * count / 100) if text.endswith("%") else int(text)
    return place + count if text.startswith("-") else place


def held_out_count(number: int | float, count: int) -> int:
    """Convert a number of images, or a fraction of ``count`` images, to a number.

    Example:
        >>> held_out_count(0.1, 2000), held_out_count(500, 2000)
        (200, 500)
    """
    return round(number * count) if isinstance(number, float) else number


def hold_out(name: str, labels: NDArray[np.int32], number: int | float) -> tuple[NDArray[np.int64], ...]:
    """Choose validation images by the labels int32 ``[N]`` of the training images, as many from each class.

    A remainder is taken from the classes with the most images, one from each (among equals, from those
    with the lowest labels). Of the ``n`` images of a class, in the order of the set, the ``q`` with the
    indices ``floor((2 k + 1) n / (2 q))``, ``k = 0 .. q - 1``, are held out: they are evenly spaced, in
    case the set is ordered. The choice is deterministic.

    Returns:
        Indices of the remaining images and of those held out, int64, each in ascending order.

    Example:
        >>> hold_out("toy", np.array([0, 1, 0, 1, 0, 1], np.int32), 2)
        (array([0, 1, 4, 5]), array([2, 3]))
    """
    classes, counts = np.unique(labels, return_counts=True)
    wanted = held_out_count(number, len(labels))
    each, more = divmod(wanted, len(classes))
    shares = np.full(len(classes), each)
    shares[np.lexsort((classes, -counts))[:more]] += 1
    least, most = len(classes), _most_held_out(counts)
    if wanted < least or (shares >= counts).any():
        images = f"{wanted} of {len(labels)} training images"
        meaning = f"{number}, which is {images}," if isinstance(number, float) else f"{images}"
        raise DataError(
            f"{name}: data.validation is {meaning} in equal numbers of {len(classes)} classes, and would "
            "leave a class without images to "
            + (
                f"validate on. Choose {least} images or more."
                if wanted < least
                else f"train on: the smallest has {counts.min()}. "
                + (f"Choose at most {most} images." if most >= least else "Choose data.validation_split.")
            )
        )
    held = np.zeros(len(labels), bool)
    for label, count, share in zip(classes, counts, shares, strict=True):
        places = np.flatnonzero(labels == label)
        held[places[(2 * np.arange(share) + 1) * count // (2 * share)]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


def _most_held_out(counts: NDArray[np.int64]) -> int:
    """Return the largest number of images to hold out that leaves each class a training image."""
    each = int(counts.min()) - 1
    return each * len(counts) + int((counts > each + 1).sum())
