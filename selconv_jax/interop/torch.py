"""Conversion between the authors' PyTorch state dicts and our variables.

Names and layouts are those of the authors' public code. PyTorch is needed only for its own pickle files.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from numpy.typing import NDArray

from selconv_jax.errors import CheckpointError, ConfigError
from selconv_jax.interop._arrays import (
    Units,
    find_fault,
    from_torch,
    shift_units,
    to_numpy,
    to_torch,
    torch_shape,
)
from selconv_jax.interop._files import check_writable, read_file, write_file
from selconv_jax.interop._names import Entry, constants_of, entries_of
from selconv_jax.interop._wrappers import find_network
from selconv_jax.models import CondenseNet, DenseNet, PreResNet, ResNeXt
from selconv_jax.nn._layers import SelectiveConv

__all__ = ["load_state_dict", "save_state_dict", "state_dict"]

Array = NDArray[np.generic]
VariablePath = tuple[str, ...]

_NETWORKS = (DenseNet, PreResNet, ResNeXt, CondenseNet)
_COLLECTIONS = ("params", "batch_stats", "selectivity")
# Endings of the names in which the variants of a network differ.
_ALLOCATION = ("is_open", "_ind_ptr", "_bias", "_eye")
# Any size large enough for the pools: the shapes of variables do not depend on it.
_SIDE = 256
_CHANNELS = 3
_SHOWN = 5


def load_state_dict(
    model: nn.Module,
    checkpoint: str | os.PathLike[str] | Mapping[str, Any],
    *,
    image_shape: tuple[int, int, int] | None = None,
    align_corners: bool = False,
) -> dict[str, Any]:
    """Load a checkpoint of the authors' code as variables of our network.

    Shifts are converted from (column, row) to (row, column), and from the authors' unit to pixels, which on
    square images are equal unless PyTorch before 1.3 was used (see ``align_corners``). Sources use -1 for
    "the channel itself" there, too. Batch counts (``num_batches_tracked``) and constants (``_eye``) are
    dropped.

    Args:
        model: A `DenseNet`, `PreResNet`, `ResNeXt` or `CondenseNet` with the arguments that the checkpoint
            was trained with; ``variant="plain"`` for their networks without selective layers.
        checkpoint: Arrays (of NumPy, JAX or PyTorch) by the authors' names, or the path of a ``.npz``,
            ``.safetensors`` or, if torch is installed, PyTorch file (``.pt``, ``.pth``, ``.tar``, ``.model``,
            ``.ckpt``, ``.bin``), from which only tensors are loaded. The arrays may be inside dictionaries
            (such as ``"state_dict"``) and prefixes (such as ``module.`` and ``_orig_mod.``), in any order and
            nesting; other entries outside are ignored.
        image_shape: ``(H, W, C)`` of the images. Required if they are not square, and with ``align_corners``.
        align_corners: The checkpoint was trained with PyTorch before 1.3, whose sampling placed the ends of
            an image at the centres of its outer pixels: in a layer that reads ``W x W`` pixels, the unit is
            ``(W - 1) / W`` of a pixel.

    Returns:
        The variables, with the structure, shapes and dtypes of ``model.init`` (parameters in
        ``param_dtype``). Check `selconv_jax.required_capacity` before setting ``capacity`` below 1.

    Raises:
        CheckpointError: The file cannot be read, or entries are missing, unexpected, of another shape, or
            hold impossible values (a gate other than 0 or 1, a source that is not a channel, NaN); the
            message lists all of them. Or the checkpoint holds two such networks that differ.
        ConfigError: The network is not one of those above, or ``image_shape`` is missing or invalid.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from selconv_jax.models import DenseNet
        >>> model = DenseNet(num_classes=10, blocks=(1,), growth=4, variant="plain")
        >>> variables = model.init(jax.random.key(0), jnp.ones((1, 8, 8, 1)), train=False)
        >>> theirs = state_dict(model, variables)
        >>> theirs["features.conv0.weight"].shape
        (8, 1, 3, 3)
        >>> ours = load_state_dict(model, theirs)
        >>> jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), ours, variables))
        True
    """
    if isinstance(checkpoint, Mapping):
        label, content = "the state dict", checkpoint
    else:
        label, content = os.fspath(checkpoint), read_file(Path(checkpoint))
    template, entries, units = _describe(model, _CHANNELS, image_shape, align_corners)
    names = {entry.name for entry in entries}
    try:
        found = find_network(content, names | {name for name, _ in constants_of(entries)}, names)
    except CheckpointError as error:
        raise CheckpointError(f"{label} {error}") from None
    given = found.arrays
    if image_shape is None:
        entries = [_as_stored(entry, given) for entry in entries]

    problems: dict[str, list[str]] = {
        "missing": [entry.name for entry in entries if entry.name not in given],
        "unexpected": sorted(found.others),
        "of another shape": [],
        "with impossible values": [],
    }
    variables: dict[VariablePath, Array] = {}
    for entry in entries:
        if entry.name not in given:
            continue
        array = to_numpy(given[entry.name])
        dtype = template[entry.path].dtype
        if array.shape != torch_shape(entry):
            shapes = f"{list(array.shape)} instead of {list(torch_shape(entry))}"
            problems["of another shape"].append(f"{entry.name}: {shapes}")
        elif fault := find_fault(entry, array, dtype):
            problems["with impossible values"].append(f"{entry.name}: {fault}")
        else:
            variables[entry.path] = from_torch(entry, array, dtype, units)
    if any(problems.values()):
        raise CheckpointError(
            f"{label} does not fit {type(model).__name__}: {_listing(problems)}. "
            + _remedy(model, entries, given, problems)
        )
    return traverse_util.unflatten_dict({path: jnp.asarray(array) for path, array in variables.items()})


def state_dict(
    model: nn.Module,
    variables: Mapping[str, Any],
    *,
    image_shape: tuple[int, int, int] | None = None,
    align_corners: bool = False,
) -> dict[str, Array]:
    """Convert our variables to a state dict of the authors' code; the inverse of `load_state_dict`.

    After ``torch.from_numpy`` of every array, the strict ``load_state_dict`` of their network accepts it:
    batch counts (``num_batches_tracked``) are 0, and the constants (``_eye``) are included. Arguments are
    those of `load_state_dict`, and variables: ``params``, ``batch_stats`` and, unless the network is plain,
    ``selectivity``.

    Returns:
        Arrays by the authors' names, with dtypes unchanged except bfloat16, which becomes float32, gates,
        which become floating, and sources, which become int64.

    Raises:
        ConfigError: The variables do not belong to the network.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from selconv_jax.models import CondenseNet
        >>> model = CondenseNet(num_classes=10, blocks=(1,), growth=(4,), variant="plain")
        >>> variables = model.init(jax.random.key(0), jnp.ones((1, 8, 8, 3)), train=False)
        >>> sorted(state_dict(model, variables))[:2]
        ['classifier.bias', 'classifier.weight']
    """
    kept = {key: value for key, value in variables.items() if key in _COLLECTIONS}
    flat: dict[VariablePath, Any] = traverse_util.flatten_dict(kept)
    stem = flat.get(("params", "stem", "kernel"))
    _, entries, units = _describe(
        model, _CHANNELS if stem is None else stem.shape[2], image_shape, align_corners
    )

    paths = {entry.path for entry in entries}
    problems = {
        "missing": sorted("/".join(entry.path) for entry in entries if entry.path not in flat),
        "unexpected": ["/".join(path) for path in sorted(flat.keys() - paths)],
        "of another shape": [
            f"{'/'.join(entry.path)}: {list(flat[entry.path].shape)} instead of {list(entry.shape)}"
            for entry in entries
            if entry.path in flat and flat[entry.path].shape != entry.shape
        ],
    }
    if any(problems.values()):
        raise ConfigError(
            f"these are not the variables of this {type(model).__name__}: {_listing(problems)}."
        )

    host = jax.device_get(flat)
    dtype = host["batch_stats", "classifier", "norm", "mean"].dtype
    arrays = {entry.name: to_torch(entry, host[entry.path], dtype, units) for entry in entries}
    return {**arrays, **{name: value(dtype) for name, value in constants_of(entries)}}


def save_state_dict(
    path: str | os.PathLike[str],
    model: nn.Module,
    variables: Mapping[str, Any],
    *,
    image_shape: tuple[int, int, int] | None = None,
    align_corners: bool = False,
    overwrite: bool = False,
) -> None:
    """Save the result of `state_dict` to a file.

    The file ends in ``.npz`` or ``.safetensors`` (which needs the package safetensors).

    Raises:
        CheckpointError: The file already exists and ``overwrite`` is not set, cannot be written, or has
            another suffix.
        ConfigError: The variables do not belong to the network.

    Example:
        >>> import pathlib, tempfile, jax, jax.numpy as jnp
        >>> from selconv_jax.models import DenseNet
        >>> model = DenseNet(num_classes=10, blocks=(1,), growth=4, variant="plain")
        >>> variables = model.init(jax.random.key(0), jnp.ones((1, 8, 8, 1)), train=False)
        >>> path = pathlib.Path(tempfile.mkdtemp(), "weights.npz")
        >>> save_state_dict(path, model, variables)
        >>> sorted(load_state_dict(model, path))
        ['batch_stats', 'params']
    """
    check_writable(Path(path), overwrite=overwrite)
    arrays = state_dict(model, variables, image_shape=image_shape, align_corners=align_corners)
    write_file(Path(path), arrays)


def _as_stored(entry: Entry, given: Mapping[str, Any]) -> Entry:
    """Give the stem's entry the checkpoint's number of image channels; return any other entry unchanged."""
    stored = np.shape(given.get(entry.name, ()))
    if entry.layer != ("stem",) or len(stored) != len(entry.shape):
        return entry
    return dataclasses.replace(entry, shape=(*entry.shape[:-2], max(stored[1], 1), entry.shape[-1]))


def _describe(
    model: nn.Module, channels: int, image_shape: tuple[int, int, int] | None, align_corners: bool
) -> tuple[dict[VariablePath, jax.ShapeDtypeStruct], list[Entry], Units]:
    """Return the shapes of a network's variables by path, their entries, and the units of its shifts."""
    if not isinstance(model, _NETWORKS):
        names = ", ".join(network.__name__ for network in _NETWORKS)
        raise ConfigError(f"the model is a {type(model).__name__}; the authors' networks are {names}.")
    if image_shape is not None and (
        len(image_shape) != 3 or not all(isinstance(size, int) and size > 0 for size in image_shape)
    ):
        raise ConfigError(f"image_shape is {image_shape!r}; it must be (H, W, C), all whole and at least 1.")
    if image_shape is None and align_corners:
        raise ConfigError("align_corners is True, which needs image_shape: give the (H, W, C) of the images.")
    sizes: dict[VariablePath, tuple[int, int]] = {}  # of the layers' inputs; square without an image_shape

    def record(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if isinstance(context.module, SelectiveConv) and context.method_name == "__call__":
            sizes[context.module.path] = args[0].shape[1:3]
        return call(*args, **kwargs)

    image = jax.ShapeDtypeStruct((1, *(image_shape or (_SIDE, _SIDE, channels))), model.param_dtype)
    with nn.intercept_methods(record):
        shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), image)
    template = traverse_util.flatten_dict(shapes)
    entries = entries_of(model, {path: leaf.shape for path, leaf in template.items()})
    return template, entries, shift_units(sizes, align_corners)


def _listing(problems: Mapping[str, list[str]]) -> str:
    parts = []
    for kind, items in problems.items():
        if items:
            shown = ", ".join([*items[:_SHOWN], "..."] if len(items) > _SHOWN else items)
            parts.append(f"{len(items)} {kind} ({shown})")
    return "; ".join(parts)


def _remedy(
    model: nn.Module, entries: list[Entry], given: Mapping[str, Any], problems: Mapping[str, list[str]]
) -> str:
    if not any(problems[kind] for kind in ("missing", "unexpected", "of another shape")):
        return "The checkpoint is damaged or of a diverged run; use another one."
    if not given:
        return f"It has none of this network's names in the authors' code, such as {entries[0].name}."
    misfits = problems["missing"] + problems["unexpected"]
    # If all misfits are entries in which the variants differ, the checkpoint is of another variant.
    if misfits and all(name.endswith(_ALLOCATION) for name in misfits):
        endings = {name.rpartition(".")[2] for name in (*given, *problems["unexpected"])}
        variant = "selective" if "_ind_ptr" in endings else "gate_only" if "is_open" in endings else "plain"
        return f"The checkpoint is of a {variant} network, the model has variant={model.variant!r}."
    return "Build the model with the arguments that the checkpoint was trained with (blocks, classes, ...)."
