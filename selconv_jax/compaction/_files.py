"""Compacted networks in files: one npz archive with the network's description and its variables."""

import dataclasses
import functools
import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from flax.core import unfreeze

from selconv_jax._utils.files import check_target, write_atomically
from selconv_jax._utils.versions import version_of
from selconv_jax.compaction._layout import LayerLayout
from selconv_jax.compaction._network import Compact
from selconv_jax.errors import CheckpointError
from selconv_jax.models import MODELS

__all__ = ["load_compact", "save_compact"]

_FORMAT = 2
_DTYPES = ("dtype", "param_dtype")  # attributes that are types
_UNSEEN = ("name", "parent", "capacity")  # attributes that do not change what a network computes
_ENTRY = "selconv_jax"  # the description; variables have a "/" in their names
_NETWORKS: dict[str, Any] = {network.__name__: network for network, _ in MODELS.values()}


def save_compact(
    path: str | os.PathLike[str], model: Compact, variables: Mapping[str, Any], *, overwrite: bool = False
) -> None:
    """Write a compacted network into one file, complete or not at all.

    Args:
        path: The file; ``.npz`` by custom.
        model: The network, from `selconv_jax.compact`.
        variables: Its variables.
        overwrite: Replace a file that is there.

    Raises:
        CheckpointError: The file is there already, or cannot be written.
        ValueError: The model has not been compacted, or the names of its variables cannot be told apart.

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
    description = {
        "format": _FORMAT,
        "version": version_of("selconv-jax"),
        "network": type(model.network).__name__,
        "attributes": _attributes(model.network),
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
    """Read a file of `save_compact`.

    Args:
        path: The file.
        network: The whole network it was made from, with the attributes it had (``capacity`` apart); None:
            one of `selconv_jax.models`, whose description is in the file.

    Returns:
        The compacted network and its variables, as `selconv_jax.compact` returned them.

    Raises:
        CheckpointError: The file is missing, damaged, none of `save_compact`, or of another network.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file.")
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it holds one array")
        with archive:
            arrays = dict(archive)
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise CheckpointError(
            f"{path}: not a whole file of a compacted network ({error}). Write it anew."
        ) from error
    if (entry := arrays.pop(_ENTRY, None)) is None:
        raise CheckpointError(f"{path}: not a file of selconv_jax.save_compact: it has no entry {_ENTRY!r}.")
    try:
        return _from_file(path, json.loads(entry.tobytes()), arrays, network)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: the description in it is damaged ({error}). Write it anew."
        ) from error


def _from_file(
    path: Path, description: Mapping[str, Any], arrays: Mapping[str, Any], network: nn.Module | None
) -> tuple[Compact, dict[str, Any]]:
    if description["format"] != _FORMAT:
        raise CheckpointError(
            f"{path}: written by selconv-jax {description['version']} in format {description['format']}, "
            f"this version reads format {_FORMAT}. Install that version."
        )
    name = description["network"]
    if network is not None and type(network).__name__ != name:
        raise CheckpointError(f"{path}: holds a {name}, but network is a {type(network).__name__}.")
    if network is not None:
        _check_attributes(path, network, description["attributes"])
    elif name in _NETWORKS:
        network = _NETWORKS[name](**_arguments(_NETWORKS[name], description["attributes"]))
    else:
        raise CheckpointError(
            f"{path}: holds a {name}, none of the library's networks. Pass the network it was made from: "
            "load_compact(path, network=...)."
        )
    dtypes = description["dtypes"]
    if dtypes.keys() != arrays.keys():
        odd = sorted(dtypes.keys() ^ arrays.keys())[0]
        raise CheckpointError(f"{path}: variables are missing or left over, such as {odd}. Write it anew.")
    flat = {
        tuple(name.split("/")): jnp.asarray(array.view(jnp.dtype(dtypes[name])))
        for name, array in arrays.items()
    }
    layouts = tuple((name, LayerLayout.from_json(values)) for name, values in description["layouts"].items())
    widths = tuple((name, int(width)) for name, width in description["widths"].items())
    return Compact(network, layouts, widths, description.get("method")), traverse_util.unflatten_dict(flat)


def _attributes(network: nn.Module) -> dict[str, Any]:
    """The attributes of a network as plain values."""
    return {
        field.name: _description(getattr(network, field.name, None))
        for field in dataclasses.fields(network)
        if field.name not in ("name", "parent")
    }


def _description(value: Any) -> Any:
    """Plain values that are equal for equal attributes; of functions and other objects, their names."""
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


def _check_attributes(path: Path, network: nn.Module, saved: Mapping[str, Any]) -> None:
    """Raise a `CheckpointError` if an attribute is not as it is in the file; in older files some are not."""
    given = json.loads(json.dumps(_attributes(network)))
    if difference := _difference(saved, given):
        name, one, other = difference
        raise CheckpointError(
            f"{path}: was made from a {type(network).__name__} with {name}={one!r}, but network has "
            f"{name}={other!r}. Pass the network it was made from."
        )


def _difference(saved: Any, given: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """The first attribute that differs, with both values."""
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
    """The array, or its bits if it is of a type that NumPy's files do not know, such as bfloat16."""
    return array if array.dtype.isbuiltin else array.view(f"u{array.dtype.itemsize}")
