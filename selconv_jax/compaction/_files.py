"""Files of compacted networks: one npz archive with a network's description and its variables."""

import dataclasses
import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from flax.core import unfreeze

from selconv_jax._utils.files import check_target, read_npz, write_atomically
from selconv_jax._utils.versions import version_of
from selconv_jax.compaction._network import Compact
from selconv_jax.compaction._static_conv import LayerLayout
from selconv_jax.errors import CheckpointError
from selconv_jax.models import MODELS
from selconv_jax.transforms._capacity import FittedCapacity

_FORMAT = 2
_DTYPES = ("dtype", "param_dtype")  # attributes that are types
_UNSEEN = ("name", "parent", "capacity")  # attributes that do not change what a network computes
_ENTRY = "selconv_jax"  # name of the description; names of variables contain a "/"
_NETWORKS: dict[str, Any] = {network.__name__: network for network, _ in MODELS.values()}


def save_compact(
    path: str | os.PathLike[str], model: Compact, variables: Mapping[str, Any], *, overwrite: bool = False
) -> None:
    """Write a compacted network atomically to one file.

    Args:
        path: The file, by convention ``.npz``.
        model: The network, from `selconv_jax.compact`.
        variables: Its variables.
        overwrite: Replace an existing file.

    Raises:
        CheckpointError: The file already exists or cannot be written.
        ValueError: The model is not compacted, or the name of a module or variable contains ``/``.

    Example:
        >>> import jax, jax.numpy as jnp, selconv_jax, tempfile
        >>> from pathlib import Path
        >>> network = selconv_jax.models.DenseNet(num_classes=10, blocks=(1, 1), growth=4)
        >>> variables = network.init(jax.random.key(0), jnp.ones((1, 8, 8, 3)), train=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     selconv_jax.save_compact(Path(folder) / "small.npz", *selconv_jax.compact(network, variables))
        ...     model, variables = selconv_jax.load_compact(Path(folder) / "small.npz")
        >>> model.apply(variables, jnp.ones((1, 8, 8, 3)), train=False).shape
        (1, 10)
    """
    if not isinstance(model, Compact):
        raise ValueError(f"model is a {type(model).__name__}; pass what selconv_jax.compact returned.")
    path = Path(path)
    check_target(path, overwrite=overwrite)
    flat = jax.device_get(traverse_util.flatten_dict(unfreeze(dict(variables))))
    if any("/" in part for name in flat for part in name):
        raise ValueError("the name of a module or variable contains '/'; rename it.")
    arrays = {"/".join(name): np.asarray(value) for name, value in flat.items()}
    network = _without_capacities(model.network)
    description = {
        "format": _FORMAT,
        "version": version_of("selconv-jax"),
        "network": type(network).__name__,
        "attributes": _attributes(network),
        "method": model.method,
        "layouts": {name: layout.to_json() for name, layout in model.layouts},
        "widths": dict(model.widths),
        "dtypes": {name: array.dtype.name for name, array in arrays.items()},
    }
    entry = np.frombuffer(json.dumps(description).encode(), np.uint8)
    plain = {name: _plain(array) for name, array in arrays.items()}
    try:
        write_atomically(path, lambda file: np.savez(file, **{_ENTRY: entry, **plain}))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error}).") from error


def load_compact(
    path: str | os.PathLike[str], *, network: nn.Module | None = None
) -> tuple[Compact, dict[str, Any]]:
    """Read a file written by `save_compact`.

    See `save_compact` for an example.

    Args:
        path: The file.
        network: The whole network that it was made from, with the same attributes except ``capacity`` and
            with or without `selconv_jax.with_capacity`. May be None for networks of `selconv_jax.models`,
            which are rebuilt from the description in the file.

    Returns:
        The compacted network and its variables, as `selconv_jax.compact` returned them.

    Raises:
        CheckpointError: The file is missing, damaged, not from `save_compact`, or of another network.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file.")
    try:
        arrays = read_npz(path)
    except ValueError as error:
        raise CheckpointError(
            f"{path}: not a whole file of a compacted network ({error}). Write it again."
        ) from error
    if (entry := arrays.pop(_ENTRY, None)) is None:
        raise CheckpointError(f"{path}: not a file of selconv_jax.save_compact: it has no entry {_ENTRY!r}.")
    try:
        return _from_file(path, json.loads(entry.tobytes()), arrays, network)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: the description in it is damaged ({error}). Write it again."
        ) from error


def _from_file(
    path: Path, description: Mapping[str, Any], arrays: Mapping[str, Any], network: nn.Module | None
) -> tuple[Compact, dict[str, Any]]:
    if description["format"] != _FORMAT:
        raise CheckpointError(
            f"{path}: written by selconv-jax {description['version']} in format {description['format']}, "
            f"this version reads format {_FORMAT}. Install that version."
        )
    name, attributes = description["network"], description["attributes"]
    if name == FittedCapacity.__name__:  # earlier versions wrote the capacities too
        name, attributes = (attributes["model"][key] for key in ("network", "attributes"))
    if network is not None:
        whole = _without_capacities(network)
        if type(whole).__name__ != name:
            raise CheckpointError(f"{path}: holds a {name}, but network is a {type(whole).__name__}.")
        # The file may be older and lack some attributes.
        given = json.loads(json.dumps(_attributes(whole)))
        if difference := _difference(attributes, given):
            attribute, one, other = difference
            raise CheckpointError(
                f"{path}: was made from a {name} with {attribute}={one!r}, but network has "
                f"{attribute}={other!r}. Pass the network it was made from."
            )
    elif name in _NETWORKS:
        network = _NETWORKS[name](**_arguments(_NETWORKS[name], attributes))
    else:
        raise CheckpointError(
            f"{path}: holds a {name}, none of the library's networks. Pass the network it was made from: "
            "load_compact(path, network=...)."
        )
    dtypes = description["dtypes"]
    if dtypes.keys() != arrays.keys():
        odd = sorted(dtypes.keys() ^ arrays.keys())[0]
        raise CheckpointError(f"{path}: variables are missing or left over, such as {odd}. Write it again.")
    flat = {
        tuple(name.split("/")): jnp.asarray(array.view(jnp.dtype(dtypes[name])))
        for name, array in arrays.items()
    }
    layouts = tuple((name, LayerLayout.from_json(values)) for name, values in description["layouts"].items())
    widths = tuple((name, int(width)) for name, width in description["widths"].items())
    return Compact(network, layouts, widths, description.get("method")), traverse_util.unflatten_dict(flat)


def _without_capacities(network: nn.Module) -> nn.Module:
    """Return the network that `with_capacity` was called with: a file holds no capacities."""
    return network.model if isinstance(network, FittedCapacity) else network


def _attributes(network: nn.Module) -> dict[str, Any]:
    """Describe the attributes of a network by plain values."""
    return {
        field.name: _description(getattr(network, field.name, None))
        for field in dataclasses.fields(network)
        if field.name not in ("name", "parent")
    }


def _description(value: Any) -> Any:
    """Describe a value by plain values, equal for equal attributes; functions and other objects by name."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item() if isinstance(value.item(), bool | int | float | str) else str(value)
    if isinstance(value, tuple | list):
        return [_description(item) for item in value]
    if isinstance(value, Mapping):
        return {str(name): _description(item) for name, item in value.items()}
    if isinstance(value, nn.Module):
        return {"network": type(value).__name__, "attributes": _attributes(value)}
    if isinstance(value, np.ndarray | jax.Array):
        return _description(np.asarray(value).tolist())
    if isinstance(value, functools.partial):
        return [_description(part) for part in (value.func, value.args, value.keywords)]
    try:
        name = jnp.dtype(value).name
    except (TypeError, ValueError):
        name = "object"  # as NumPy calls classes
    return getattr(value, "__qualname__", type(value).__qualname__) if name == "object" else name


def _difference(saved: Any, given: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """Return the first attribute that differs, with both values."""
    if isinstance(saved, Mapping) and isinstance(given, Mapping):
        for key in saved:
            if key not in _UNSEEN and (found := _difference(saved[key], given.get(key), f"{name}.{key}")):
                return found
        return None
    return None if saved == given else (name.strip(".").replace(".attributes", ""), saved, given)


def _arguments(network: type[nn.Module], attributes: Mapping[str, Any]) -> dict[str, Any]:
    known = {field.name for field in dataclasses.fields(network)}
    if unknown := sorted(attributes.keys() - known):
        raise ValueError(f"{network.__name__} has no attribute {unknown[0]!r}")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in attributes.items()}
    types = {name: jnp.dtype(values[name]) for name in _DTYPES if values.get(name) is not None}
    return {**values, **types}


def _plain(array: Any) -> Any:
    """Return the array, or its bits if NumPy's files do not support its type, such as bfloat16."""
    return array.view(f"u{array.dtype.itemsize}") if array.dtype.kind == "V" else array
