"""StableHLO files: functions serialized by `jax.export`, which need JAX to run but not this package."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax import export, lax

from selconv_jax._utils.files import check_target
from selconv_jax._xla.platforms import tracing_for
from selconv_jax.errors import ConfigError
from selconv_jax.export._files import import_package, read, symbolic_batch, write

# Platforms of `jax.export`, and the names of `tracing_for`.
_PLATFORMS = {"cpu": "cpu", "cuda": "gpu", "tpu": "tpu"}


def save_stablehlo(
    path: str | os.PathLike[str], function: Callable[..., Any], *inputs: Any, overwrite: bool = False
) -> None:
    """Write a function atomically as StableHLO, for a batch of any size but 0 on CPU, CUDA and TPU.

    `jax.export.deserialize` reads the file in any process that has JAX, for at least the next six months of
    JAX releases; this package is not needed. The layers are traced for each platform, so the file has the
    formulation that suits the platform it runs on. It has no gradient.

    Args:
        path: The file, by convention ``.stablehlo``.
        function: Called with the inputs; its constants, such as the variables of a network, are stored; if
            they lie on several devices, take their `jax.device_get`. For a Linen model
            ``functools.partial(model.apply, variables, train=False)``, for an NNX module after
            ``module.eval()`` the module itself.
        *inputs: Arrays or `jax.ShapeDtypeStruct`; only their types and their shapes, except for the first
            axis, matter.
        overwrite: Replace an existing file.

    Raises:
        CheckpointError: The file already exists or cannot be written.
        ConfigError: The package flatbuffers is missing, or the function cannot be exported.

    Example:
        >>> import functools, jax, jax.numpy as jnp, selconv_jax, tempfile
        >>> from pathlib import Path
        >>> from selconv_jax.export import save_stablehlo
        >>> layer, x = selconv_jax.SelectiveConv(8, (3, 3)), jnp.ones((1, 6, 6, 4))
        >>> variables = layer.init(jax.random.key(0), x, train=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "layer.stablehlo"
        ...     save_stablehlo(path, functools.partial(layer.apply, variables, train=False), x)
        ...     exported = jax.export.deserialize(bytearray(path.read_bytes()))
        >>> exported.call(jnp.ones((5, 6, 6, 4))).shape
        (5, 6, 6, 8)
    """
    path = Path(path)
    check_target(path, overwrite=overwrite)
    import_package("stablehlo", "flatbuffers")
    shapes = symbolic_batch(inputs)
    branches = {platform: _traced_for(function, target) for platform, target in _PLATFORMS.items()}

    def anywhere(*arrays: Any) -> Any:
        return lax.platform_dependent(*arrays, **branches)

    try:
        exported = export.export(jax.jit(anywhere), platforms=tuple(_PLATFORMS))(*shapes)
    except Exception as error:  # the function may raise anything
        raise ConfigError(
            f"the function cannot be exported for batches of any size: {' '.join(str(error).split())[:300]}"
        ) from error
    write(path, bytes(exported.serialize()))


def _traced_for(function: Callable[..., Any], target: str) -> Callable[..., Any]:
    def traced(*arrays: Any) -> Any:
        with tracing_for(target):
            return function(*arrays)

    return traced


def load_stablehlo(path: str | os.PathLike[str]) -> Callable[..., Any]:
    """Read a file of `save_stablehlo`, or any other that `jax.export` can read.

    See `save_stablehlo` for an example.

    Args:
        path: The file.

    Returns:
        The function, compiled when it is called.

    Raises:
        CheckpointError: The file is missing or damaged.
        ConfigError: The package flatbuffers is missing.
    """
    import_package("stablehlo", "flatbuffers")
    exported = read(Path(path), "StableHLO", lambda file: export.deserialize(bytearray(file.read_bytes())))
    return jax.jit(exported.call)
