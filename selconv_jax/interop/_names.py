"""Names of a network's variables in PyTorch state dicts: the authors', torchvision's and timm's."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import flax.linen as nn
import numpy as np
from numpy.typing import NDArray

from selconv_jax.errors import ConfigError
from selconv_jax.models import CondenseNet

Array = NDArray[np.generic]
Shape = tuple[int, ...]

# Our names of a module's variables, mapped to PyTorch's.
_NORM = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_LINEAR = {"kernel": "weight", "bias": "bias"}
_ALLOCATION = {"gate": "is_open", "source": "_ind_ptr", "shift": "_bias"}


def _layer(conv: str, norm: str) -> dict[str, str]:
    return {"kernel": f"{conv}.weight", **{ours: f"{norm}.{theirs}" for ours, theirs in _NORM.items()}}


_AUTHORS_LAYER = _layer("conv", "norm") | _ALLOCATION


@dataclass(frozen=True, eq=False)
class Layout:
    """Names of the variables of some networks in a state dict.

    Attributes:
        owner: Whose names, and of which networks.
        sign: Pattern of a name that no other layout has, with the numbers of block and layer.
        modules: Patterns of our paths of modules, their path in the state dict, and names of their variables.
        first: Number of the first block, and of the first layer of a block.
        option: Argument of our network that makes it one of these; empty: the default.
    """

    owner: str
    sign: str
    modules: tuple[tuple[str, str, Mapping[str, str]], ...]
    first: int = 1
    option: str = ""

    @property
    def example(self) -> str:
        """The name of the sign in the first layer."""
        return self.sign.replace(r"(\d+)", str(self.first)).replace("\\", "")


AUTHORS = Layout(
    "the authors' code",
    r"features\.block(\d+)\.layer(\d+)\.brc_1\.conv\.weight",
    (
        (r"stem", r"features.conv0", _LINEAR),
        (r"block(\d+)_layer(\d+)/conv(\d+)", r"features.block\1.layer\2.brc_\3", _AUTHORS_LAYER),
        (r"transition(\d+)", r"features.trans\1.brc", _AUTHORS_LAYER),
        (r"classifier/norm", r"features.norm_last", _NORM),
        (r"classifier/linear", r"classifier", _LINEAR),
    ),
)
DENSENET = Layout(
    "torchvision's and timm's DenseNets",
    r"features\.denseblock(\d+)\.denselayer(\d+)\.conv2\.weight",
    (
        (r"stem", r"features.conv0", _LINEAR),
        (r"stem/norm", r"features.norm0", _NORM),
        (
            r"block(\d+)_layer(\d+)/conv(\d+)",
            r"features.denseblock\1.denselayer\2",
            _layer(r"conv\3", r"norm\3"),
        ),
        (r"transition(\d+)", r"features.transition\1", _layer("conv", "norm")),
        (r"classifier/norm", r"features.norm5", _NORM),
        (r"classifier/linear", r"classifier", _LINEAR),
    ),
    option="stem_norm",
)
RESNETV2 = Layout(
    "timm's pre-activation ResNets (resnetv2)",
    r"stages\.(\d+)\.blocks\.(\d+)\.conv2\.weight",
    (
        (r"stem", r"stem.conv", _LINEAR),
        (r"block(\d+)_layer(\d+)/conv(\d+)", r"stages.\1.blocks.\2", _layer(r"conv\3", r"norm\3")),
        # There one batch norm is before both the shortcut and the first convolution.
        (r"block(\d+)_layer(\d+)/shortcut", r"stages.\1.blocks.\2", _layer("downsample.conv", "norm1")),
        (r"classifier/norm", r"norm", _NORM),
        (r"classifier/linear", r"head.fc", _LINEAR),
    ),
    first=0,
    option="projection",
)
LAYOUTS = (AUTHORS, DENSENET, RESNETV2)


@dataclass(frozen=True)
class Entry:
    """A variable of a network under both names."""

    path: tuple[str, ...]  # ours, such as ("params", "block1_layer1", "conv1", "kernel")
    name: str  # theirs, such as "features.block1.layer1.brc_1.conv.weight"
    shape: Shape  # of our array

    @property
    def layer(self) -> tuple[str, ...]:
        """The path of the module that holds the variable."""
        return self.path[1:-1]

    @property
    def field(self) -> str:
        """The variable's name in its module: ``"kernel"``, ``"shift"``, ``"gate"``, ..."""
        return self.path[-1]


def layout_of(model: nn.Module) -> Layout:
    """Return the layout of a network's state dicts."""
    return next((one for one in LAYOUTS if one.option and getattr(model, one.option, False)), AUTHORS)


def entries_of(model: nn.Module, shapes: Mapping[tuple[str, ...], Shape]) -> list[Entry]:
    """Look up the names of a network's variables, given by path; sorted, numbers in numeric order.

    Only the authors' layout has the allocation; in the others, a batch norm may be that of two layers.

    Raises:
        ConfigError: A variable has no name in the layout.
    """
    entries = [
        Entry(path, _torch_name(model, path), shape)
        for path, shape in shapes.items()
        if layout_of(model) is AUTHORS or path[-1] not in _ALLOCATION
    ]
    return sorted(entries, key=lambda entry: _natural(entry.name))


def constants_of(entries: list[Entry]) -> Iterator[tuple[str, Callable[[np.dtype], Array]]]:
    """Generate the names that the authors' networks store but do not compute with, and their initial values.

    The values are functions of the statistics' dtype: a batch count for each batch norm, and an identity
    matrix for each selective layer.
    """
    for entry in entries:
        prefix = entry.name.rpartition(".")[0]
        if entry.field == "mean":
            yield f"{prefix}.num_batches_tracked", lambda dtype: np.zeros((), np.int64)
        elif entry.field == "source":
            yield f"{prefix}._eye", lambda dtype: np.eye(2, 3, dtype=dtype)


def _torch_name(model: nn.Module, path: tuple[str, ...]) -> str:
    layout, module, field = layout_of(model), "/".join(path[1:-1]), path[-1]
    numbered = re.sub(r"(?<=block|layer)\d+", lambda found: str(int(found[0]) - 1 + layout.first), module)
    for ours, theirs, fields in layout.modules:
        match = re.fullmatch(ours, numbered)
        if match and field in fields:
            name = match.expand(f"{theirs}.{fields[field]}")
            # The authors' CondenseNet has the first convolution outside `features`.
            is_outside = ours == "stem" and isinstance(model, CondenseNet)
            return name.removeprefix("features.") if is_outside else name
    raise ConfigError(
        f"{type(model).__name__} has a variable {'/'.join(path)}, which has no name in {layout.owner}; only "
        "networks of selconv_jax.models can be converted."
    )


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
