"""Safetensors files of variables under flat names."""

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

from selconv_jax._utils.files import check_target
from selconv_jax._utils.modules import as_variables
from selconv_jax.errors import ConfigError
from selconv_jax.export._files import import_package, read, write


def save_safetensors(
    path: str | os.PathLike[str],
    variables: Any,
    *,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write variables atomically, named by their paths, such as ``params/block1_layer1/conv1/kernel``.

    Args:
        path: The file, by convention ``.safetensors``.
        variables: Variables of a Linen model, or an NNX module.
        metadata: Texts to store with them.
        overwrite: Replace an existing file.

    Raises:
        CheckpointError: The file already exists or cannot be written.
        ConfigError: The package safetensors is missing, or ``metadata`` holds more than texts.
        ValueError: The name of a module or variable is no string or contains ``/``, or a variable is not an
            array of numbers.

    Example:
        >>> import jax, jax.numpy as jnp, selconv_jax, tempfile
        >>> from pathlib import Path
        >>> from selconv_jax.export import load_safetensors, save_safetensors
        >>> layer = selconv_jax.SelectiveConv(8, (3, 3))
        >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 6, 6, 4)), train=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_safetensors(Path(folder) / "layer.safetensors", variables)
        ...     read = load_safetensors(Path(folder) / "layer.safetensors")
        >>> jax.tree.all(jax.tree.map(jnp.array_equal, read, variables))
        True
    """
    path = Path(path)
    check_target(path, overwrite=overwrite)
    package = import_package("safetensors", "safetensors.flax")
    plain = unfreeze(dict(nn.meta.unbox(as_variables(variables))))
    flat = traverse_util.flatten_dict(plain)
    for name, value in flat.items():
        if not all(isinstance(part, str) and "/" not in part for part in name):
            raise ValueError(f"{name}: rename it; names of modules and variables are strings without '/'.")
        if not hasattr(value, "dtype") or jnp.issubdtype(value.dtype, jax.dtypes.extended):
            kind = type(value).__name__
            raise ValueError(f"{'/'.join(name)} is a {kind}, not an array of numbers; leave it out.")
    if not all(isinstance(text, str) for pair in (metadata or {}).items() for text in pair):
        raise ConfigError(f"metadata is {metadata!r}; names and values must be strings.")
    arrays = {"/".join(name): np.asarray(value, order="C") for name, value in flat.items()}
    write(path, package.save(arrays, None if metadata is None else dict(metadata)))


def load_safetensors(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the variables of a file of `save_safetensors`.

    See `save_safetensors` for an example.

    Args:
        path: The file.

    Returns:
        The variables as nested dictionaries.

    Raises:
        CheckpointError: The file is missing or damaged.
        ConfigError: The package safetensors is missing.
    """
    package = import_package("safetensors", "safetensors.flax")
    return traverse_util.unflatten_dict(read(Path(path), "safetensors", package.load_file), sep="/")
