"""Conversion between PyTorch state dicts and our variables.

Names and layouts are those of the authors' public code, of torchvision's and timm's DenseNets, and of timm's
pre-activation ResNets. PyTorch is needed only for its own pickle files.
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

from selconv_jax._utils.arguments import is_whole
from selconv_jax.errors import CheckpointError, ConfigError
from selconv_jax.interop._arrays import (
    Units,
    find_fault,
    from_torch,
    shift_units,
    to_numpy,
    to_torch,
    torch_shape,
    without_allocation,
)
from selconv_jax.interop._files import check_writable, read_file, write_file
from selconv_jax.interop._names import AUTHORS, Entry, constants_of, entries_of, layout_of
from selconv_jax.interop._recognition import listing, network_in, recognize, remedy, unknown
from selconv_jax.interop._wrappers import find_network, shapes_in
from selconv_jax.models import CondenseNet, DenseNet, PreResNet, ResNeXt
from selconv_jax.nn._layers import SelectiveConv

__all__ = ["load_network", "load_state_dict", "save_state_dict", "state_dict"]

Array = NDArray[np.generic]
VariablePath = tuple[str, ...]

_NETWORKS = (DenseNet, PreResNet, ResNeXt, CondenseNet)
_COLLECTIONS = ("params", "batch_stats", "selectivity")
# Any size large enough for the pools: the shapes of variables do not depend on it.
_SIDE = 256
_CHANNELS = 3
# No channel closed or copied.
_INITIAL = {"gate": True, "source": -1, "shift": 0}


def load_network(
    checkpoint: str | os.PathLike[str] | Mapping[str, Any], **arguments: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """Load a DenseNet of torchvision or timm, or a pre-activation ResNet of timm, as model and variables.

    Numbers of blocks, layers, channels and classes follow from the names and shapes. Of the DenseNets, those
    whose first width is twice their growth can be expressed (121, 161, 169, 201, not timm's 264d and
    blur121d); of timm's ResNets, ``resnetv2_50``, ``_101`` and ``_152``. The others have other stems,
    shortcuts, blocks or norms, which the message names.

    Args:
        checkpoint: See `load_state_dict`.
        **arguments: Further arguments of the network: ``variant``, ``capacity``, ``dtype``, ... The variant
            is ``"selective"`` unless given, with all channels open and none copied.

    Returns:
        A `DenseNet` with ``stem_norm`` or a `PreResNet` with ``projection``, and its variables. It computes
        the same logits, of images ``[N, H, W, C]`` normalized as for the PyTorch network.

    Raises:
        CheckpointError: As `load_state_dict`; or the layout is unknown or the authors', whose names do not
            determine the network; or the network cannot be expressed.
        ConfigError: The network has no such argument, or its value is invalid.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from selconv_jax.interop.torch import load_network, state_dict
        >>> from selconv_jax.models import DenseNet
        >>> small = DenseNet(10, (1, 1), growth=4, compression=0.5, stem="imagenet", stem_norm=True)
        >>> variables = small.init(jax.random.key(0), jnp.ones((1, 32, 32, 3)), train=False)
        >>> model, variables = load_network(state_dict(small, variables), variant="gate_only")
        >>> model.blocks, model.growth, sorted(variables)
        ((1, 1), 4, ['batch_stats', 'params', 'selectivity'])
    """
    label, content = _read(checkpoint)
    shapes = shapes_in(content)
    layout = recognize(shapes)
    try:
        if layout is None:
            raise CheckpointError(unknown(shapes))
        model = network_in(layout, shapes, arguments)
    except CheckpointError as error:
        raise CheckpointError(f"{label} {error}") from None
    return model, _load(model, label, content, None, align_corners=False)


def load_state_dict(
    model: nn.Module,
    checkpoint: str | os.PathLike[str] | Mapping[str, Any],
    *,
    image_shape: tuple[int, int, int] | None = None,
    align_corners: bool = False,
) -> dict[str, Any]:
    """Load a PyTorch checkpoint as variables of our network.

    Its layout follows from the network: a `DenseNet` with ``stem_norm`` has torchvision's and timm's names, a
    `PreResNet` with ``projection`` timm's (``resnetv2``), any other the authors'. Only the authors' layout
    has an allocation; from the others, all channels are open and none is copied.

    Shifts are converted from (column, row) to (row, column), and from the authors' unit to pixels, which on
    square images are equal unless PyTorch before 1.3 was used (see ``align_corners``). Sources use -1 for
    "the channel itself" there, too. Batch counts (``num_batches_tracked``) and constants (``_eye``) are
    dropped.

    Args:
        model: A `DenseNet`, `PreResNet`, `ResNeXt` or `CondenseNet` with the arguments that the checkpoint
            was trained with; ``variant="plain"`` for their networks without selective layers.
        checkpoint: Arrays (of NumPy, JAX or PyTorch) by PyTorch's names, or the path of a ``.npz``,
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
            message lists all of them. Or the checkpoint holds two such networks that differ, or is of an
            unknown layout.
        ConfigError: The network is not one of those above, or ``image_shape`` is missing or invalid.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from selconv_jax.interop.torch import load_state_dict, state_dict
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
    label, content = _read(checkpoint)
    return _load(model, label, content, image_shape, align_corners)


def _read(checkpoint: str | os.PathLike[str] | Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return a checkpoint's name in messages, and its content."""
    if isinstance(checkpoint, Mapping):
        return "the state dict", checkpoint
    if not isinstance(checkpoint, str | os.PathLike):
        raise ConfigError(
            f"checkpoint is a {type(checkpoint).__name__}; it must be a path or a state dict, such as "
            "network.state_dict()."
        )
    return os.fspath(checkpoint), read_file(Path(checkpoint))


def _load(
    model: nn.Module,
    label: str,
    content: Mapping[str, Any],
    image_shape: tuple[int, int, int] | None,
    align_corners: bool,
) -> dict[str, Any]:
    template, entries, units = _describe(model, _CHANNELS, image_shape, align_corners)
    names = {entry.name for entry in entries}
    try:
        found = find_network(content, names | {name for name, _ in constants_of(entries)}, names)
    except CheckpointError as error:
        raise CheckpointError(f"{label} {error}") from None
    given = found.arrays
    if not given and recognize(shapes_in(content)) is None:
        raise CheckpointError(f"{label} {unknown(shapes_in(content))}")
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
            f"{label} does not fit {type(model).__name__}: {listing(problems)}. "
            + remedy(model, shapes_in(content), given, problems)
        )
    for path in template.keys() - {entry.path for entry in entries}:
        variables[path] = np.full(template[path].shape, _INITIAL[path[-1]], template[path].dtype)
    return traverse_util.unflatten_dict({path: jnp.asarray(array) for path, array in variables.items()})


def state_dict(
    model: nn.Module,
    variables: Mapping[str, Any],
    *,
    image_shape: tuple[int, int, int] | None = None,
    align_corners: bool = False,
) -> dict[str, Array]:
    """Convert our variables to a PyTorch state dict; the inverse of `load_state_dict`.

    After ``torch.from_numpy`` of every array, the strict ``load_state_dict`` of their network accepts it:
    batch counts (``num_batches_tracked``) are 0, and the constants (``_eye``) are included. Arguments are
    those of `load_state_dict`, and variables: ``params``, ``batch_stats`` and, unless the network is plain,
    ``selectivity``. In layouts other than the authors', the weights of closed channels become 0.

    Returns:
        Arrays by PyTorch's names, with dtypes unchanged except bfloat16, which becomes float32, gates,
        which become floating, and sources, which become int64.

    Raises:
        ConfigError: The variables do not belong to the network; or the layout cannot hold them, because
            channels are copied, or because batch norms differ that the layout shares (see `PreResNet`).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from selconv_jax.interop.torch import state_dict
        >>> from selconv_jax.models import CondenseNet
        >>> model = CondenseNet(num_classes=10, blocks=(1,), growth=(4,), variant="plain")
        >>> variables = model.init(jax.random.key(0), jnp.ones((1, 8, 8, 3)), train=False)
        >>> sorted(state_dict(model, variables))[:2]
        ['classifier.bias', 'classifier.weight']
    """
    kept = {key: value for key, value in variables.items() if key in _COLLECTIONS}
    flat: dict[VariablePath, Any] = traverse_util.flatten_dict(kept)
    stem = flat.get(("params", "stem", "kernel"))
    template, entries, units = _describe(
        model, _CHANNELS if stem is None else stem.shape[2], image_shape, align_corners
    )

    problems = {
        "missing": ["/".join(path) for path in sorted(template.keys() - flat.keys())],
        "unexpected": ["/".join(path) for path in sorted(flat.keys() - template.keys())],
        "of another shape": [
            f"{'/'.join(path)}: {list(flat[path].shape)} instead of {list(template[path].shape)}"
            for path in sorted(template.keys() & flat.keys())
            if flat[path].shape != template[path].shape
        ],
    }
    if any(problems.values()):
        raise ConfigError(f"these are not the variables of this {type(model).__name__}: {listing(problems)}.")

    host = jax.device_get(flat)
    if layout_of(model) is not AUTHORS:
        host = without_allocation(host, layout_of(model).owner)
    dtype = host["batch_stats", "classifier", "norm", "mean"].dtype
    arrays: dict[str, Array] = {}
    for entry in entries:
        array = to_torch(entry, host[entry.path], dtype, units)
        if not np.array_equal(arrays.setdefault(entry.name, array), array, equal_nan=True):
            raise ConfigError(
                f"{entry.name} is one array in {layout_of(model).owner}, but {'/'.join(entry.path)} differs "
                "from that of the other layer: training moved them apart, and no network there computes this."
            )
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
        >>> from selconv_jax.interop.torch import load_state_dict, save_state_dict
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
        raise ConfigError(f"the model is a {type(model).__name__}; networks with known names are {names}.")
    if image_shape is not None and (
        len(image_shape) != 3 or not all(is_whole(size) and size > 0 for size in image_shape)
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
