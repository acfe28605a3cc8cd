"""Reading and writing the arrays of one checkpoint with Orbax.

`orbax.checkpoint.experimental.v1.load(FOLDER)` gives a flat dictionary from the path of each leaf,
`params/Dense_0/kernel`, to its array. In a run of several processes each writes its part; whatever
their number, the arrays come back whole on any other number.
"""

import json
import logging
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore
from orbax.checkpoint.experimental import v1 as ocp

from selconv_jax.errors import CheckpointError
from selconv_jax.train._checkpoints.manifest import describe

PyTree: TypeAlias = Any

_SHOWN_LEAVES = 5
_PLAIN = re.compile(r"[\w /.,:;=+@~-]*")

# Orbax loses files when one process runs two saves at the same time.
_one_at_a_time = threading.Lock()

# Orbax reports every phase of every save; what matters is raised.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


def is_plain(folder: Path) -> bool:
    """Return whether Orbax takes the name of a folder literally.

    It looks for files by patterns that begin with the folder's name, in which ``[``, ``*`` and ``?`` stand
    for other characters, and Tensorstore takes a backslash for a slash: what is written under such names is
    incomplete or lies elsewhere.
    """
    return _PLAIN.fullmatch(str(folder)) is not None


@contextmanager
def _under_plain_name(folder: Path) -> Iterator[Path]:
    """Yield the folder, through a symbolic link with a plain name if its own is not plain."""
    if is_plain(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="selconv-") as names:
        link = Path(names) / "checkpoints"
        link.symlink_to(folder.parent, target_is_directory=True)
        yield link / folder.name


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Return the leaves by path, e.g. `opt_state/0/trace/Dense_0/kernel`, in the order of the tree."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}
    if len(named) < len(paths):
        raise ValueError("Two leaves have the same path: rename the keys that contain '/'.")
    return named


def write_arrays(folder: Path, leaves: Mapping[str, np.ndarray]) -> None:
    """Write the arrays of a single-process run, and keep the terminal clean when that fails.

    Orbax closes its event loop at the first write that fails. Every write still in progress then ends, some
    time later, in an exception that nobody can catch, and Python would print each of them.
    """
    with _under_plain_name(folder) as plain, _one_at_a_time:
        # Stores of other threads do the same: in any other order the hook of one would stay.
        hook = sys.unraisablehook
        if not isinstance(hook, _WithoutClosedLoops):
            sys.unraisablehook = _WithoutClosedLoops(hook)
        ocp.save(plain, _storable(leaves))
        sys.unraisablehook = hook  # after a failure it stays exchanged, as nobody knows when the others end


class _WithoutClosedLoops:
    """Hook for unraisable exceptions that passes on all but those of a closed event loop."""

    def __init__(self, hook: Callable[[Any], Any]) -> None:
        self._hook = hook

    def __call__(self, report: Any) -> None:
        if str(report.exc_value) != "Event loop is closed":
            self._hook(report)


def start_writing(folder: Path, leaves: Mapping[str, Any]) -> Any:
    """Start writing the arrays of all processes, which all have to call this for a new, shared, plain folder.

    On return this process's part of them has been copied; ``result()`` of the returned future waits until all
    processes have written.
    """
    return ocp.save_async(folder, _storable(leaves))


def read_arrays(folder: Path, leaves: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Read whole arrays, given as `describe` does, in this process alone, whichever processes wrote them."""
    like = {}
    for name, text in leaves.items():
        dtype, _, shape = text.partition("[")
        like[name] = np.empty(json.loads(f"[{shape}"), jnp.dtype(dtype))
    context = ocp.Context()
    if jax.process_count() > 1:
        # Each process reads independently: it may be the only one that needs to.
        alone = jax.process_index()
        context.multiprocessing.primary_host = alone
        context.multiprocessing.active_processes = {alone}
        context.multiprocessing.barrier_sync_key_prefix = f"process{alone}"
    try:
        with context, _under_plain_name(folder) as plain, _one_at_a_time:
            arrays = ocp.load(plain, _storable(like))
    except MemoryError:
        raise
    except Exception as error:  # of many kinds, as Orbax and Tensorstore read
        reason = str(error).partition(" [tensorstore_spec")[0].strip().partition("\n")[0]
        raise CheckpointError(f"{folder} is damaged: its arrays cannot be read: {reason}.") from error
    return {**like, **{name: np.asarray(array) for name, array in arrays.items()}}


def check_written(folder: Path, leaves: Mapping[str, Any]) -> None:
    """Check that arrays written by several processes can be read, without involving the others.

    Orbax would wait for the other processes, or send to them, in the middle of their steps; so this reads
    the Tensorstore files that Orbax leaves directly.
    """
    store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{(folder / 'state').absolute()}/"}}
    for name, leaf in _storable(leaves).items():
        try:
            found = tensorstore.open({"driver": "zarr3", "kvstore": {**store, "path": f"{name}/"}}).result()
            array = found.read().result()
        except ValueError as error:
            raise CheckpointError(f"{name} cannot be read back: {str(error).partition(' [')[0]}.") from error
        if describe(array) != describe(leaf):
            raise CheckpointError(f"{name} was read back as {describe(array)}, written as {describe(leaf)}.")


def check_leaves(folder: Path, leaves: Mapping[str, str], template: PyTree) -> None:
    """Check that the leaves of a checkpoint, given by path as `describe` does, match the current model."""
    expected = {name: describe(like) for name, like in named_leaves(template).items()}
    names = [*expected, *(name for name in leaves if name not in expected)]
    differences = [
        f"{name}: expected {expected.get(name, 'none')}, found {leaves.get(name, 'none')}"
        for name in names
        if expected.get(name) != leaves.get(name)
    ]
    if not differences:
        return
    shown = differences[:_SHOWN_LEAVES]
    if len(differences) > len(shown):
        shown.append(f"... and {len(differences) - len(shown)} more")
    if all(name.split("/")[-1] == "key" for name in names if expected.get(name) != leaves.get(name)):
        raise CheckpointError(
            f"{folder} has random keys of another kind ({differences[0]}). Set jax_default_prng_impl "
            "(JAX_DEFAULT_PRNG_IMPL) to what it was when the run began."
        )
    raise CheckpointError(
        f"{folder} is a checkpoint of another model: {len(differences)} of {len(names)} leaves "
        "are missing, extra, or of another dtype or shape:\n  " + "\n  ".join(shown) + "\n"
        "Restore it with the model and the optimizer that it was saved with."
    )


def placed(arrays: Mapping[str, np.ndarray], template: PyTree) -> PyTree:
    """Place arrays on the devices of a template, in its structure; NumPy arrays where it has some."""
    leaves = [_place(arrays[name], like) for name, like in named_leaves(template).items()]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def _place(array: np.ndarray, like: Any) -> Any:
    """Place one leaf as in the template; a dtype that JAX would narrow stays in NumPy."""
    narrowed = jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype
    if narrowed or isinstance(like, np.ndarray | np.generic):
        return array
    sharding = getattr(like, "sharding", None)
    if sharding is not None and not sharding.is_fully_addressable:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
    # An array that was not committed to a device stays uncommitted: it may join others on any mesh.
    return jax.device_put(array, like.sharding if getattr(like, "committed", True) else None)


def _storable(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out arrays of size 0, which Orbax refuses; the manifest records their dtype and shape."""
    return {name: leaf for name, leaf in leaves.items() if leaf.size}
