"""Files of named arrays: npz, safetensors, and (reading only) PyTorch's pickles."""

import importlib
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selconv_jax._utils.files import check_target, read_npz, write_atomically
from selconv_jax.errors import CheckpointError

_WRITABLE = (".npz", ".safetensors")
# The authors' program names its files last.model and best.model.
_PICKLES = (".pt", ".pth", ".tar", ".model", ".ckpt", ".bin")
_READABLE = (*_WRITABLE, *_PICKLES)


def read_file(path: Path) -> Mapping[str, Any]:
    """Read a file of named arrays, whose suffix determines its format.

    Returns:
        NumPy arrays by name; for PyTorch's pickles the saved mapping, with its tensors on the CPU.

    Raises:
        CheckpointError: The file is missing, damaged or of an unknown format, holds more than arrays, or
            needs a package that is not installed.
    """
    _check_suffix(path, _READABLE)
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file.")
    if path.suffix == ".npz":
        try:
            return read_npz(path)
        except ValueError as error:
            raise CheckpointError(f"{path}: not a whole npz file of plain arrays.") from error
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)


def check_writable(path: Path, *, overwrite: bool = False) -> None:
    """Raise a `CheckpointError` if the suffix is unknown, a package is missing, or as `check_target` does."""
    _check_suffix(path, _WRITABLE)
    if path.suffix == ".safetensors":
        _import_safetensors(path)
    check_target(path, overwrite=overwrite)


def write_file(path: Path, arrays: Mapping[str, NDArray[np.generic]]) -> None:
    """Write contiguous arrays atomically, replacing an existing file; see `check_writable` for errors."""
    check_writable(path, overwrite=True)
    try:
        if path.suffix == ".npz":
            write_atomically(path, lambda file: np.savez(file, **dict(arrays)))  # type: ignore[arg-type]
        else:
            write_atomically(path, _import_safetensors(path).save(dict(arrays)))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error}).") from error


def _check_suffix(path: Path, known: tuple[str, ...]) -> None:
    if path.suffix not in known:
        raise CheckpointError(
            f"{path}: the suffix {path.suffix!r} names no known kind of file; use one of {', '.join(known)}."
        )


def _import_safetensors(path: Path) -> Any:
    try:
        return importlib.import_module("safetensors.numpy")
    except ImportError as error:
        raise CheckpointError(
            f"{path}: safetensors files need the package safetensors: pip install 'selconv-jax[interop]'."
        ) from error


def _read_safetensors(path: Path) -> dict[str, NDArray[np.generic]]:
    package = _import_safetensors(path)
    try:
        return package.load_file(str(path))
    except (AttributeError, KeyError, TypeError) as error:  # of the file's types, such as float8
        raise CheckpointError(
            f"{path}: an array has a type that NumPy does not know ({error}). Save it as float32."
        ) from error
    except Exception as error:  # the package's own error type is not part of the module
        raise CheckpointError(f"{path}: not a whole safetensors file ({error}).") from error


def _read_pickle(path: Path) -> Mapping[str, Any]:
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError as error:
        raise CheckpointError(
            f"{path}: files of PyTorch need the package torch: pip install torch. Or convert the file where "
            f"torch is installed: state = torch.load({path.name!r}, map_location='cpu', weights_only=True); "
            f"numpy.savez({path.with_suffix('.npz').name!r}, **{{k: v.numpy() for k, v in state.items()}})."
        ) from error
    try:
        # Only tensors and plain containers: any other pickle could run arbitrary code.
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        named = f" ({name.group(1)})" if name else ""
        raise CheckpointError(
            f"{path}: refused, as it is damaged or holds objects other than tensors{named}, and loading "
            "those would run code from the file. Save the state dict alone: "
            "torch.save(model.state_dict(), path)."
        ) from error
    except Exception as error:  # damaged files raise nearly anything
        raise CheckpointError(f"{path}: not a whole file of PyTorch ({error}).") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path}: holds a {type(content).__name__}, not a state dict. Save it as "
            "torch.save(model.state_dict(), path)."
        )
    return content
