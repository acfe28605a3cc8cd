"""Checkpoints of a run: atomic, verified when they are read, pruned to the last few and the best.

Orbax writes the arrays: `orbax.checkpoint.experimental.v1.load(DIR/<step>)` gives a flat dictionary
from the path of each leaf, `params/Dense_0/kernel`, to its array. Beside them lies `manifest.json`:
the score, dtype and shape of every leaf, and a BLAKE2b digest of every file. Tensorstore does not
check array data, so the digests are compared before anything of a checkpoint is used.

Of a run with several processes, each writes its share of the arrays; the first one completes what they
have written. Whatever the number of processes and devices, a checkpoint restores on any other.

Folders only ever appear, change places and disappear by a rename, so a process killed at any
moment leaves nothing half-made under the name of a step. `<step>.partial` is being written,
`<step>.removed` being deleted; `<step>.replaced` is what `<step>` was before a new save of the
same step, and still counts as `<step>` if the process died before the new one took its place.
Orbax's `training.Checkpointer` deletes what it overwrites before the new data is written, and
forgets which checkpoints were to be pruned when a save fails; so it is not used.
"""

import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint.experimental import v1 as ocp

from selconv_jax.errors import CheckpointError

__all__ = ["CheckpointStore", "Restored"]

PyTree: TypeAlias = Any

_MANIFEST = "manifest.json"
_STEP = re.compile(r"(\d+)(\.replaced)?")
_LEFTOVER = re.compile(r"\d+\.(partial.*|replaced|removed)")
_DESCRIPTION = re.compile(r"(\w+)(\[.*\])")
_SHOWN_LEAVES = 5

# Orbax reports every phase of every save; what matters is raised as a CheckpointError.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


@dataclass(frozen=True)
class Restored:
    """What `CheckpointStore.restore` found.

    Attributes:
        step: The step of the checkpoint.
        state: The pytree, with the structure, shapes, dtypes and shardings of the template.
        skipped: One sentence for each newer checkpoint found damaged: its folder and file, and
            what is wrong with it.
    """

    step: int
    state: PyTree
    skipped: tuple[str, ...]


class CheckpointStore:
    """The checkpoints of one run: `DIR/<step>/`, of which the last `keep` and the best stay.

    A background thread writes one save at a time; every method first waits for it, and raises its
    error if it failed. Close the store, or use it as a context manager: a save that the end of the
    interpreter cuts short is lost. Opening a store changes nothing on the disk, so that a run may
    be evaluated while it trains; the leftovers of a killed process are removed by the next save.

    Args:
        directory: The folder of the checkpoints, created by the first save.
        keep: How many of the last checkpoints stay, beside the best one; at least 1.

    Raises:
        ValueError: `keep` is below 1.

    Example:
        >>> import tempfile, numpy as np
        >>> state = {"step": np.array(7), "kernel": np.ones((3, 3), np.float32)}
        >>> with CheckpointStore(tempfile.mkdtemp(), keep=2) as store:
        ...     store.save(7, state, score=0.91)
        ...     restored = store.restore(state)
        >>> restored.step, restored.state["kernel"].shape
        (7, (3, 3))
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int = 3) -> None:
        if keep < 1:
            raise ValueError(f"keep = {keep}: at least 1 checkpoint has to stay.")
        self.directory = Path(directory).absolute()
        self.keep = keep
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, step: int, state: PyTree, score: float | None = None) -> None:
        """Copies a state to the host and starts to write it; a checkpoint of the step is replaced.

        Once it is complete, all but the best and the last `keep` up to `step` are removed. Those
        after `step` (the run went back to an earlier one) stay until they are replaced.

        Args:
            step: The number of the checkpoint.
            state: Any pytree of arrays, those of several processes wherever they lie; random keys as
                their raw uint32 data.
            score: Higher is better, e.g. the test accuracy. None or NaN: never the best.

        Raises:
            CheckpointError: The save *before* this one could not be written.
        """
        self._wait()
        score = None if score is None or math.isnan(score) else float(score)
        if jax.process_count() == 1:
            # A true copy: the training step may reuse the buffers that are donated to it.
            leaves = {name: np.array(leaf) for name, leaf in _named(jax.device_get(state)).items()}
            self._pending = self._writer.submit(self._write, step, leaves, score)
            return
        arrays = _named(state)
        partial = self.directory / f"{step}.partial"
        if jax.process_index() == 0:
            with _told(step, self.directory):
                self.directory.mkdir(parents=True, exist_ok=True)
                self._sweep()
        # On return every process has a copy in its memory, and goes on to write its share of it.
        written = ocp.save_async(partial, _storable(arrays))
        self._pending = self._writer.submit(self._complete_together, step, arrays, score, written)

    def restore(self, template: PyTree, step: int | None = None) -> Restored:
        """Verifies a checkpoint and reads it back, bit for bit.

        Args:
            template: Arrays or `jax.ShapeDtypeStruct`, with shardings if any. NumPy leaves come
                back as NumPy arrays, the others as JAX arrays.
            step: Which one; None: the newest that is not damaged.

        Returns:
            The state and its step. Damaged checkpoints that were passed over stay on the disk.

        Raises:
            CheckpointError: There is no such checkpoint, it is damaged (with None: all are), or it
                is one of another model.
        """
        step, manifest, damaged = self._find(step)
        return Restored(step, _load(self._folders()[step], manifest, template), damaged)

    def read(self, step: int | None = None) -> tuple[int, dict[str, np.ndarray]]:
        """Verifies a checkpoint and reads its arrays without a template, as tables and pictures need.

        Args:
            step: Which one; None: the newest that is not damaged.

        Returns:
            Its step, and the arrays by path, e.g. `params/Dense_0/kernel`.

        Raises:
            CheckpointError: There is no such checkpoint, or it is damaged (with None: all are).
        """
        step, manifest, _ = self._find(step)
        arrays = _load_arrays(self._folders()[step], manifest)
        return step, {name: array for name, array in arrays.items() if array.size}

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, damaged ones included, in ascending order."""
        self._wait()
        return sorted(self._folders())

    @property
    def latest_step(self) -> int | None:
        """The last of `steps`; None without any."""
        return max(self.steps(), default=None)

    @property
    def best_step(self) -> int | None:
        """The step of the highest score, the earliest of equal ones; None without any score."""
        self._wait()
        return self._best(self._folders())

    def close(self) -> None:
        """Waits for the save in progress.

        Raises:
            CheckpointError: It could not be written.
        """
        try:
            self._wait()
        finally:
            self._writer.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _folders(self) -> dict[int, Path]:
        """The folder of every step; a `.replaced` one only where the step has no other."""
        if not self.directory.is_dir():
            return {}
        paths = sorted(self.directory.iterdir(), reverse=True)  # "5.replaced", then "5"
        return {int(found[1]): path for path in paths if (found := _STEP.fullmatch(path.name))}

    def _find(self, step: int | None) -> tuple[int, dict[str, Any], tuple[str, ...]]:
        """A good checkpoint, its manifest, and what is wrong with the newer ones."""
        self._wait()
        folders = self._folders()
        if not folders or (step is not None and step not in folders):
            wanted = "" if step is None else f" of step {step}"
            found = ", ".join(map(str, sorted(folders))) or "none"
            raise CheckpointError(f"There is no checkpoint{wanted} in {self.directory}; found: {found}.")
        damaged: list[str] = []
        for candidate in sorted(folders, reverse=True) if step is None else [step]:
            try:
                return candidate, _verified_manifest(folders[candidate]), tuple(damaged)
            except CheckpointError as error:
                damaged.append(str(error))
        remedy = "Start the run anew." if step is None else "Restore another step, or the newest."
        raise CheckpointError("\n".join([*damaged, remedy]))

    def _best(self, folders: Mapping[int, Path]) -> int | None:
        scores: dict[int, float] = {}
        for step in sorted(folders):
            with suppress(CheckpointError):  # a damaged manifest: its score is not known
                score = _manifest(folders[step])["score"]
                if score is not None:
                    scores[step] = score
        return max(scores, key=scores.__getitem__, default=None)  # the first of equal ones

    def _write(self, step: int, leaves: Mapping[str, np.ndarray], score: float | None) -> None:
        """Writes, completes and publishes one checkpoint, then prunes (in the thread)."""
        with _told(step, self.directory):
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                self._sweep()
                _save_arrays(self.directory / f"{step}.partial", _storable(leaves))
                self._complete(step, leaves, score)
            except Exception:
                with suppress(OSError):
                    self._sweep()
                raise

    def _complete_together(
        self, step: int, leaves: Mapping[str, Any], score: float | None, written: Any
    ) -> None:
        """Waits until all processes have written their shares; the first one completes (in the thread)."""
        with _told(step, self.directory):
            written.result()
            if jax.process_index() == 0:
                self._complete(step, leaves, score)

    def _complete(self, step: int, leaves: Mapping[str, Any], score: float | None) -> None:
        """Adds the manifest to arrays that are written, and gives the folder its name."""
        partial = self.directory / f"{step}.partial"
        final, replaced = self.directory / f"{step}", self.directory / f"{step}.replaced"
        files = sorted(file for file in partial.rglob("*") if file.is_file())
        manifest = {
            "score": score,
            "leaves": {name: _describe(leaf) for name, leaf in leaves.items()},
            "files": {file.relative_to(partial).as_posix(): _digest(file) for file in files},
        }
        (partial / _MANIFEST).write_bytes(_encode(manifest))
        if final.exists():
            final.rename(replaced)
        partial.rename(final)
        shutil.rmtree(replaced, ignore_errors=True)
        self._prune(step)

    def _prune(self, step: int) -> None:
        folders = self._folders()
        overtaken = sorted(other for other in folders if other <= step)
        for other in set(overtaken[: -self.keep]) - {self._best(folders)}:
            removed = self.directory / f"{other}.removed"
            folders[other].rename(removed)
            shutil.rmtree(removed, ignore_errors=True)

    def _sweep(self) -> None:
        """Removes what killed or failed saves left; a `.replaced` that counts gets its name."""
        for step, folder in self._folders().items():
            folder.rename(self.directory / f"{step}")
        for path in self.directory.iterdir():
            if _LEFTOVER.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)


def _named(tree: PyTree) -> dict[str, Any]:
    """The leaves by path, e.g. `opt_state/0/trace/Dense_0/kernel`, in the order of the tree."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}
    if len(named) < len(paths):
        raise ValueError("Two leaves have the same path: rename the keys that contain '/'.")
    return named


def _storable(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Without arrays of size 0, which Orbax refuses; all there is to store of them is in the manifest."""
    return {name: leaf for name, leaf in leaves.items() if leaf.size}


def _load_arrays(folder: Path, manifest: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Has Orbax read the arrays of a checkpoint, whole, whoever wrote them."""
    described = {name: _DESCRIPTION.fullmatch(text) for name, text in manifest["leaves"].items()}
    like = {
        name: np.empty(json.loads(found[2]), jnp.dtype(found[1]))
        for name, found in described.items()
        if found
    }
    context = ocp.Context()
    if jax.process_count() > 1:
        # Each process reads by itself: it may be the only one that needs to.
        alone = jax.process_index()
        context.multiprocessing.primary_host = alone
        context.multiprocessing.active_processes = {alone}
        context.multiprocessing.barrier_sync_key_prefix = f"process{alone}"
    with context:
        arrays = ocp.load(folder, _storable(like))
    return {**like, **{name: np.asarray(array) for name, array in arrays.items()}}


@contextmanager
def _told(step: int, directory: Path) -> Iterator[None]:
    """Turns what goes wrong while a checkpoint is written into a `CheckpointError`."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(
            f"Could not write the checkpoint of step {step} in {directory}: {_reason(error)} The checkpoints "
            "before it are intact."
        ) from error


def _save_arrays(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Has Orbax write a checkpoint, and keeps the terminal clean when that fails.

    Orbax closes its event loop at the first write that fails. Each of the others, still under way,
    then ends in an exception that nobody can catch, and Python prints every one of them.
    """
    hook = sys.unraisablehook
    sys.unraisablehook = lambda report: (
        None if str(report.exc_value) == "Event loop is closed" else hook(report)
    )
    try:
        ocp.save(folder, arrays)
    except BaseException:
        time.sleep(1.0)  # for the others to end
        raise
    finally:
        sys.unraisablehook = hook


def _describe(leaf: Any) -> str:
    """Dtype and shape, e.g. `float32[3, 3, 16, 32]`."""
    return f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _encode(manifest: Mapping[str, Any]) -> bytes:
    """The bytes of a manifest, among them a digest of all the rest."""
    text = json.dumps(manifest, sort_keys=True)
    digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return json.dumps({**manifest, "digest": digest}, sort_keys=True).encode()


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        raw = (folder / _MANIFEST).read_bytes()
        manifest: dict[str, Any] = json.loads(raw)
        del manifest["digest"]
        intact = raw == _encode(manifest)
    except OSError as error:
        raise CheckpointError(f"{folder} is damaged: {_MANIFEST}: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise CheckpointError(f"{folder} is damaged: {_MANIFEST} has been altered.")
    return manifest


def _verified_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint of which every file is as it was written."""
    manifest = _manifest(folder)
    for name, digest in manifest["files"].items():
        try:
            intact = _digest(folder / name) == digest
        except OSError as error:
            raise CheckpointError(f"{folder} is damaged: {name}: {error.strerror}.") from error
        if not intact:
            raise CheckpointError(f"{folder} is damaged: {name} has been altered.")
    return manifest


def _load(folder: Path, manifest: Mapping[str, Any], template: PyTree) -> PyTree:
    """The arrays of a verified checkpoint, placed as the template is."""
    wanted = _named(template)
    expected = {name: _describe(like) for name, like in wanted.items()}
    found: dict[str, str] = manifest["leaves"]
    names = [*expected, *(name for name in found if name not in expected)]
    differences = [
        f"{name}: expected {expected.get(name, 'none')}, found {found.get(name, 'none')}"
        for name in names
        if expected.get(name) != found.get(name)
    ]
    if differences:
        shown = differences[:_SHOWN_LEAVES]
        if len(differences) > len(shown):
            shown.append(f"... and {len(differences) - len(shown)} more")
        raise CheckpointError(
            f"{folder} is a checkpoint of another model: {len(differences)} of {len(names)} leaves "
            "are missing, extra, or of another dtype or shape:\n  " + "\n  ".join(shown) + "\n"
            "Restore it with the model and the optimizer that it was saved with."
        )
    arrays = _load_arrays(folder, manifest)
    leaves = [_place(arrays[name], like) for name, like in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def _place(array: np.ndarray, like: Any) -> Any:
    """One leaf where the template has it; a dtype that JAX would narrow stays in NumPy."""
    narrowed = jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype
    if narrowed or isinstance(like, np.ndarray | np.generic):
        return array
    sharding = getattr(like, "sharding", None)
    if sharding is not None and not sharding.is_fully_addressable:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
    # An array that was not committed to a device stays so: it may join others on any mesh.
    return jax.device_put(array, like.sharding if getattr(like, "committed", True) else None)


def _reason(error: BaseException) -> str:
    """What went wrong and what to do, as a sentence or two."""
    number = getattr(error, "errno", None)
    text = str(error).partition(" [tensorstore_spec")[0]
    if number in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in text:
        return "the disk is full. Free some space and resume."
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"the folder is not writable ({text})."
    return f"{text}."
