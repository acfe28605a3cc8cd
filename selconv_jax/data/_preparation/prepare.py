"""Preparation of a data set: read its original files, verify them, write a tensorflow-datasets folder.

Afterwards :func:`selconv_jax.data.load` and a plain ``tfds.data_source`` both read it.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from selconv_jax._utils.console import Progress, console_progress
from selconv_jax.data._catalog import (
    KNOWN,
    SAMPLE,
    KnownSet,
    prepare_command,
    prepared_directories,
    resolve_data_dir,
)
from selconv_jax.data._preparation.cifar import decode_cifar, read_cifar
from selconv_jax.data._preparation.download import download
from selconv_jax.data._preparation.idx import decode_idx, find_idx_files, read_idx_files
from selconv_jax.data._preparation.imagenet import open_imagenet
from selconv_jax.data._preparation.originals import ImageFiles, verify, verify_files
from selconv_jax.data._preparation.tiny_imagenet import open_tiny_imagenet
from selconv_jax.data._preparation.writing import Examples, examples_of_arrays, examples_of_files, write_tfds
from selconv_jax.errors import DataError, nearest

# Sets that are written file by file, as they may not fit into memory.
_FILE_READERS: Mapping[str, Callable[[KnownSet, Path], contextlib.AbstractContextManager[ImageFiles]]] = {
    "tiny_imagenet": open_tiny_imagenet,
    "imagenet2012": open_imagenet,
}


def prepare(
    name: str,
    source: str | os.PathLike[str] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Prepare a set of the catalog; do nothing if it is already prepared.

    The set is written to a temporary folder and renamed when it is complete: after a failure, an earlier
    set is intact and no part of the new one is left.

    Args:
        name: The set.
        source: The folder or archive with its original files. By default the folder of an installed
            package that contains them, else the official download.
        data_dir: The directory of the prepared sets; by default that of tensorflow-datasets.
        progress: Called as ``progress(task, done, total)``; by default a bar on a terminal and
            plain lines elsewhere, on standard error.

    Returns:
        The prepared directory.

    Raises:
        DataError: If the name is unknown, the files are missing or not the published ones, or the
            directory cannot be written.
    """
    if name not in KNOWN:
        raise DataError(f"There is no data set {name!r} to prepare. {nearest(name, KNOWN)}")
    known = KNOWN[name]
    if known.name == SAMPLE:
        raise DataError(f"{SAMPLE} comes with this package and needs no preparation.")
    if progress is None:
        with console_progress() as console:
            return prepare(name, source, data_dir, console)

    target = resolve_data_dir(data_dir)
    prepared = prepared_directories(target).get(known.name)
    if prepared is not None:
        progress(f"{known.name} is already prepared in {prepared}", 1, 1)
        return prepared

    path = None if source is None else Path(source).expanduser()
    if path is not None and not path.exists():
        raise DataError(
            f"{path}: there is no such file or folder. Give --from the folder or archive that "
            f"holds {known.name}; get it from {known.origin}."
        )
    if known.name in _FILE_READERS:
        if path is None:
            raise DataError(
                f"{known.name} cannot be downloaded by this program. Get it from {known.origin}, then run: "
                f"{prepare_command(known.name, target)} (PATH: the folder or archive)."
            )
        with _FILE_READERS[known.name](known, path) as files:
            verify_files(known, files, progress)
            examples = {key: examples_of_files(known, key, files) for key in known.counts}
            return _write(known, files.class_names, examples, target, progress)
    examples = _read(known, path, target, progress)
    assert known.class_names is not None  # of the sets in memory, the catalog names the classes
    return _write(known, known.class_names, examples, target, progress)


def _read(known: KnownSet, source: Path | None, data_dir: Path, progress: Progress) -> dict[str, Examples]:
    """Find, read and verify the original files of a set that fits into memory."""
    if source is None:
        source = next((place for place in known.places if place.is_dir()), None)
    task = f"Reading {known.name} from {source or 'its download'}"
    coarse: Mapping[str, NDArray[np.int32]] = {}
    if known.name == "fashion_mnist":
        if source is None:
            fetched = download(known, data_dir, progress)
            files = {file.removesuffix(".gz"): path for file, path in fetched.items()}
        else:
            files = find_idx_files(known, source)
        progress(task, 0, 1)
        parts = read_idx_files(files)
        splits = decode_idx(parts)
    else:
        if source is None:
            (source,) = download(known, data_dir, progress).values()
        progress(task, 0, 1)
        parts = read_cifar(known, source)
        splits, coarse = decode_cifar(known, parts)
    verify(known, parts, splits)
    progress(task, 1, 1)
    return {key: examples_of_arrays(key, split, coarse.get(key)) for key, split in splits.items()}


def _write(
    known: KnownSet,
    class_names: tuple[str, ...],
    splits: Mapping[str, Examples],
    data_dir: Path,
    progress: Progress,
) -> Path:
    """Write the set to a temporary folder, then rename it."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".preparing-{known.name}-", dir=data_dir))
    except OSError as error:
        raise DataError(
            f"{data_dir}: cannot be written ({error.strerror or error}). "
            "Choose another directory for the prepared sets."
        ) from error
    try:
        written = write_tfds(known, class_names, splits, draft, progress)
        final = data_dir / written.relative_to(draft)
        final.parent.mkdir(exist_ok=True)
        with contextlib.suppress(OSError):
            final.rmdir()  # only if it is empty
        written.rename(final)
    except (OSError, RuntimeError) as error:  # the record writer raises the latter
        raise DataError(
            f"{data_dir}: writing {known.name} failed ({error}). Make room, or remove what is in "
            f"the way under {data_dir / known.name}, and prepare it again."
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return final
