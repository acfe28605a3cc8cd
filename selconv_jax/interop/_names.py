"""Names of a network's variables in the authors' code."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import flax.linen as nn
import numpy as np
from numpy.typing import NDArray

from selconv_jax.errors import ConfigError
from selconv_jax.models import CondenseNet

__all__ = ["Entry", "constants_of", "entries_of"]

Array = NDArray[np.generic]
Shape = tuple[int, ...]

# Our names of a module's variables, mapped to the authors'.
_LAYER = {
    "kernel": "conv.weight",
    "scale": "norm.weight",
    "bias": "norm.bias",
    "mean": "norm.running_mean",
    "var": "norm.running_var",
    "gate": "is_open",
    "source": "_ind_ptr",
    "shift": "_bias",
}
_NORM = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_LINEAR = {"kernel": "weight", "bias": "bias"}

# Our paths of modules, the authors', and the names of the modules' variables.
_MODULES: tuple[tuple[str, str, Mapping[str, str]], ...] = (
    (r"stem", r"features.conv0", _LINEAR),
    (r"block(\d+)_layer(\d+)/conv(\d+)", r"features.block\1.layer\2.brc_\3", _LAYER),
    (r"transition(\d+)", r"features.trans\1.brc", _LAYER),
    (r"classifier/norm", r"features.norm_last", _NORM),
    (r"classifier/linear", r"classifier", _LINEAR),
)


@dataclass(frozen=True)
class Entry:
    """A variable of a network under both names."""

    path: tuple[str, ...]  # ours, such as ("params", "block1_layer1", "conv1", "kernel")
    name: str  # the authors', such as "features.block1.layer1.brc_1.conv.weight"
    shape: Shape  # of our array

    @property
    def layer(self) -> tuple[str, ...]:
        """The path of the module that holds the variable."""
        return self.path[1:-1]

    @property
    def field(self) -> str:
        """The variable's name in its module: ``"kernel"``, ``"shift"``, ``"gate"``, ..."""
        return self.path[-1]


def entries_of(model: nn.Module, shapes: Mapping[tuple[str, ...], Shape]) -> list[Entry]:
    """Look up the authors' names of a network's variables, given by path; sorted, numbers in numeric order.

    Raises:
        ConfigError: A variable has no name in the authors' networks.
    """
    entries = [Entry(path, _torch_name(model, path), shape) for path, shape in shapes.items()]
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
    module, field = "/".join(path[1:-1]), path[-1]
    for ours, theirs, fields in _MODULES:
        match = re.fullmatch(ours, module)
        if match and field in fields:
            name = f"{match.expand(theirs)}.{fields[field]}"
            # The authors' CondenseNet has the first convolution outside `features`.
            is_outside = ours == "stem" and isinstance(model, CondenseNet)
            return name.removeprefix("features.") if is_outside else name
    raise ConfigError(
        f"{type(model).__name__} has a variable {'/'.join(path)}, which the authors' networks do not have; "
        "only the networks of selconv_jax.models can be converted."
    )


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
