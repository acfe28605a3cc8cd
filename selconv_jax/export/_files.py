"""What the formats share: optional packages, inputs with a batch of any size but 0, writing and reading."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax import export

from selconv_jax._utils.files import write_atomically
from selconv_jax.errors import CheckpointError, ConfigError

T = TypeVar("T")

# Modules that each format needs, and the extra that installs them.
PACKAGES = {
    "stablehlo": (("flatbuffers",), "export"),
    "onnx": (("jax2onnx", "onnxruntime"), "onnx"),
    "safetensors": (("safetensors.flax",), "export"),
}


def check_packages(form: str) -> None:
    """Raise a `ConfigError` if a package that a format needs is not installed, without importing it."""
    modules, extra = PACKAGES[form]
    for name in modules:
        package = name.partition(".")[0]
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"files of the format {form} need the package {package}: pip install 'selconv-jax[{extra}]'."
            )


def import_package(form: str, module: str) -> Any:
    """Import a module of an optional package, see `check_packages`."""
    check_packages(form)
    return importlib.import_module(module)


def symbolic_batch(inputs: tuple[Any, ...]) -> list[jax.ShapeDtypeStruct]:
    """Replace the first axis of all inputs by the symbolic size ``batch``.

    Raises:
        ConfigError: There is no input, or one has no axes.
    """
    try:
        shapes = jax.eval_shape(lambda *arrays: arrays, *inputs)
    except TypeError:
        shapes = ()
    if not shapes or not all(getattr(shape, "ndim", 0) for shape in shapes):
        raise ConfigError(
            "the inputs must be arrays, or jax.ShapeDtypeStruct, whose first axis is the batch."
        )
    (batch,) = export.symbolic_shape("batch")
    return [jax.ShapeDtypeStruct((batch, *shape.shape[1:]), shape.dtype) for shape in shapes]


def write(path: Path, content: bytes) -> None:
    """Write a file atomically.

    Raises:
        CheckpointError: It cannot be written.
    """
    try:
        write_atomically(path, content)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error}).") from error


def read(path: Path, kind: str, decode: Callable[[Path], T]) -> T:
    """Read and decode a file.

    Args:
        path: The file.
        kind: What it holds, completing "not a whole file of".
        decode: Reads and decodes it; what it raises means that the file is damaged.

    Raises:
        CheckpointError: It is missing or damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file.")
    try:
        return decode(path)
    except Exception as error:  # damaged files raise nearly anything
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"{path}: not a whole file of {kind} ({reason}). Write it again.") from error
