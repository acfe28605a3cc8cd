"""Reading of the files of CIFAR-10 and CIFAR-100 from archives, folders and pickles."""

import io
import pickle
import tarfile
import zlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selconv_jax.data._preparation.originals import Part, read_file
from selconv_jax.errors import DataError

__all__ = ["read_batch", "read_members"]


def read_members(source: Path, names: Collection[str], folders: Sequence[str]) -> dict[str, Part]:
    """Read the files of given names.

    Args:
        source: A tar archive, whose inner folders may have any names, or a folder.
        names: The files to read.
        folders: Subfolders to search; the first that contains any of the files is used.

    Returns:
        The files that are there, by name.

    Raises:
        DataError: If the archive or a file is damaged.
    """
    return _read_archive(source, names) if source.is_file() else _read_folder(source, names, folders)


def read_batch(part: Part, archive: str, keys: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Read a pickled dictionary of arrays and lists.

    Args:
        part: The pickle.
        archive: The archive it should be from, for messages.
        keys: The entries to read.

    Returns:
        The entries as arrays.

    Raises:
        DataError: If it is damaged, lacks an entry, or wants to run code.
    """
    try:
        content = _ArrayUnpickler(io.BytesIO(part.content), encoding="bytes").load()
        batch = {key.decode() if isinstance(key, bytes) else key: content[key] for key in content}
        return {key: np.asarray(batch[key]) for key in keys}
    except Exception as error:  # a damaged pickle can raise anything
        raise DataError(f"{part.path}: not a batch of {archive} ({error!r}). Get it again.") from error


def _read_folder(source: Path, names: Collection[str], folders: Sequence[str]) -> dict[str, Part]:
    """Find the files in the first folder that contains any of them."""
    for folder in (source / name for name in folders):
        found = [folder / name for name in sorted(names) if (folder / name).is_file()]
        if found:
            return {path.name: Part(read_file(path), str(path)) for path in found}
    return {}


def _read_archive(source: Path, names: Collection[str]) -> dict[str, Part]:
    """Read files from an archive, whatever the name of the folder inside."""
    files = {}
    try:
        with tarfile.open(source) as archive:
            for member in archive:
                name = Path(member.name).name
                stream = archive.extractfile(member) if name in names else None
                if stream is not None:
                    files[name] = Part(stream.read(), f"{source}, {member.name}")
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        reason = str(error).partition("\n")[0].rstrip(":")
        raise DataError(
            f"{source}: damaged, cut short, or not an archive ({reason}). Get it again."
        ) from error
    return files


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickler restricted to dictionaries, lists, numbers, strings and NumPy arrays.

    A pickle may call any function that it names; only those that rebuild an array are allowed.
    """

    _ALLOWED = {  # noqa: RUF012
        ("_codecs", "encode"),
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it wants to call {module}.{name}")
        if name == "_reconstruct":  # its module differs between NumPy versions
            return np.empty(0).__reduce__()[0]
        return super().find_class(module, name)
