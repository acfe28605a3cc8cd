"""Checkpoints of a run: atomic, verified when they are read, pruned to the last few and the best.

A checkpoint's folder holds its arrays (see `_checkpoints.arrays`) and a `manifest.json`: score, origin,
dtype and shape of every leaf, and a BLAKE2b digest of every file. It is renamed to its final name
once the arrays have been read back. In a run of several processes each writes its part of the arrays, and
process 0 completes the checkpoint, which restores on any number of processes and devices.

Orbax's `training.Checkpointer` is not used: it deletes the checkpoint that it overwrites before the new data
is written, and forgets which checkpoints were to be pruned when a save fails.
"""

import math
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Self, TypeAlias

import jax
import numpy as np

from selconv_jax.errors import CheckpointError
from selconv_jax.train._checkpoints.arrays import (
    check_leaves,
    check_written,
    is_plain,
    named_leaves,
    placed,
    read_arrays,
    start_writing,
    write_arrays,
)
from selconv_jax.train._checkpoints.folders import step_folders, sweep, told
from selconv_jax.train._checkpoints.manifest import describe, read_manifest, verified_manifest, write_manifest
from selconv_jax.train._config_changes import check_origin

PyTree: TypeAlias = Any


class _Found(NamedTuple):
    step: int
    folder: Path
    manifest: Mapping[str, Any]
    arrays: dict[str, np.ndarray]
    damaged: tuple[str, ...]


@dataclass(frozen=True)
class Restored:
    """A checkpoint of a run.

    Attributes:
        step: Its step.
        state: The pytree, with the structure, shapes, dtypes and shardings of the template; None: not read.
        skipped: One sentence for each damaged checkpoint that might have been chosen: folder, file, problem.
    """

    step: int
    state: PyTree
    skipped: tuple[str, ...]


class CheckpointStore:
    """The checkpoints of one run in `DIR/<step>/`, of which the last `keep` and the best are kept.

    A background thread writes one save at a time; every method first waits for it, and raises its
    error if it failed. Close the store, or use it as a context manager: a save that is cut short by the
    end of the interpreter is lost. Opening a store changes nothing on the disk, so a run can be
    evaluated while it trains; the next save removes the leftovers of a killed process.

    A checkpoint with another `origin`, see `_config_changes.origin_of`, is not restored; empty: not known.

    Example:
        >>> import tempfile, numpy as np
        >>> state = {"step": np.array(7), "kernel": np.ones((3, 3), np.float32)}
        >>> with CheckpointStore(tempfile.mkdtemp(), keep=2) as store:
        ...     store.save(7, state, score=0.91)
        ...     restored = store.restore(state)
        >>> restored.step, restored.state["kernel"].shape
        (7, (3, 3))
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        keep: int = 3,
        origin: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep = {keep}: at least 1 checkpoint has to stay.")
        self.directory = Path(directory).absolute()
        if jax.process_count() > 1 and not is_plain(self.directory):
            raise CheckpointError(
                f"Several processes cannot write checkpoints to {self.directory}. Choose a directory whose "
                "path is of letters, digits, spaces and - _ . , : ; = + @ ~ alone."
            )
        self.keep = keep
        self._origin = dict(origin)
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, step: int, state: PyTree, score: float | None = None) -> None:
        """Copy a state to the host and start writing it; an existing checkpoint of the step is replaced.

        Once it is complete, all but the best and the last `keep` up to `step` are removed. Checkpoints
        after `step` (the run went back to an earlier one) stay until they are replaced.

        Args:
            step: The number of the checkpoint.
            state: Any pytree of arrays, on any devices and processes; random keys as raw uint32 data.
            score: Higher is better, e.g. the validation accuracy. None or NaN: never the best.
        """
        self._wait()
        score = None if score is None or math.isnan(score) else float(score)
        if jax.process_count() == 1:
            # A real copy: the training step may reuse the donated buffers.
            leaves = {name: np.array(leaf) for name, leaf in named_leaves(jax.device_get(state)).items()}
            self._pending = self._writer.submit(self._write, step, leaves, score)
            return
        arrays = named_leaves(state)
        with told(step, self.directory):
            if jax.process_index() == 0:
                self.directory.mkdir(parents=True, exist_ok=True)
                sweep(self.directory)
            # On return every process has copied its part into memory, and writes it in the background.
            written = start_writing(self.directory / f"{step}.partial", arrays)
        self._pending = self._writer.submit(self._complete_together, step, arrays, score, written)

    def restore(self, template: PyTree, step: int | None = None) -> Restored:
        """Verify a checkpoint and read it back, bit for bit.

        Without a step, the newest that is not damaged; those that are skipped stay on the disk. A template
        is of arrays or `jax.ShapeDtypeStruct`; its NumPy leaves come back as such, the others as JAX arrays.

        Raises:
            CheckpointError: There is no such checkpoint, it is damaged (with None: all are), or it belongs
                to another model or origin.
        """
        found = self._find(step)
        check_leaves(found.folder, found.manifest["leaves"], template)
        state = placed(found.arrays, template)
        return Restored(found.step, state, found.damaged)

    def find(self, step: int | None = None) -> Restored:
        """Verify a checkpoint as `restore` does, and return the result without the state."""
        found = self._find(step)
        return Restored(found.step, None, found.damaged)

    def read(self, step: int | None = None) -> tuple[int, dict[str, np.ndarray]]:
        """Verify a checkpoint as `restore` does; return its step, and its arrays by path."""
        found = self._find(step)
        return found.step, {name: array for name, array in found.arrays.items() if array.size}

    def steps(self) -> list[int]:
        """Return the steps of all complete checkpoints, damaged ones included, in ascending order."""
        self._wait()
        return sorted(step_folders(self.directory))

    @property
    def latest_step(self) -> int | None:
        """The last of `steps`; None without any."""
        return max(self.steps(), default=None)

    @property
    def best_step(self) -> int | None:
        """The step of the highest score, the earliest of equal ones; None without any score."""
        self._wait()
        return self._best(step_folders(self.directory))

    def unscored(self) -> tuple[str, ...]:
        """Return one sentence for each checkpoint that is damaged and whose score is thus unknown."""
        self._wait()
        problems = []
        for _, folder in sorted(step_folders(self.directory).items(), reverse=True):
            try:
                read_manifest(folder)
            except CheckpointError as error:
                problems.append(str(error))
        return tuple(problems)

    def check(self) -> None:
        """Raise the error of the last save if it has failed, without waiting for a save in progress."""
        if self._pending is not None and self._pending.done():
            self._wait()

    def close(self) -> None:
        """Wait for the save in progress, and raise its error if it failed."""
        try:
            self._wait()
        finally:
            self._writer.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _find(self, step: int | None) -> _Found:
        """Read the newest intact checkpoint, or that of a step; collect the problems of newer ones."""
        self._wait()
        folders = step_folders(self.directory)
        if not folders or (step is not None and step not in folders):
            wanted = "" if step is None else f" of step {step}"
            found = ", ".join(map(str, sorted(folders))) or "none"
            raise CheckpointError(f"There is no checkpoint{wanted} in {self.directory}; found: {found}.")
        damaged: list[str] = []
        for candidate in sorted(folders, reverse=True) if step is None else [step]:
            try:
                folder = folders[candidate]
                manifest = verified_manifest(folder)
                arrays = read_arrays(folder, manifest["leaves"])
            except CheckpointError as error:
                damaged.append(str(error))
            else:
                check_origin(folder, manifest.get("origin", {}), self._origin)
                return _Found(candidate, folder, manifest, arrays, tuple(damaged))
        remedy = "Start the run from scratch." if step is None else "Restore another step, or the newest."
        raise CheckpointError("\n".join([*damaged, remedy]))

    def _best(self, folders: Mapping[int, Path]) -> int | None:
        scores: dict[int, float] = {}
        for step in sorted(folders):
            with suppress(CheckpointError):  # damaged manifest: score unknown
                score = read_manifest(folders[step])["score"]
                if score is not None:
                    scores[step] = score
        return max(scores, key=scores.__getitem__, default=None)  # the first of equal ones

    def _write(self, step: int, leaves: Mapping[str, np.ndarray], score: float | None) -> None:
        """Write, complete and publish one checkpoint, then prune (in the thread)."""
        with told(step, self.directory):
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                sweep(self.directory)
                write_arrays(self.directory / f"{step}.partial", leaves)
                self._complete(step, leaves, score)
            except Exception:
                with suppress(OSError):
                    sweep(self.directory)
                raise

    def _complete_together(
        self, step: int, leaves: Mapping[str, Any], score: float | None, written: Any
    ) -> None:
        """Wait until all processes have written their parts; process 0 completes (in the thread)."""
        with told(step, self.directory):
            written.result()
            if jax.process_index() == 0:
                self._complete(step, leaves, score)

    def _complete(self, step: int, leaves: Mapping[str, Any], score: float | None) -> None:
        """Read the written arrays back, add the manifest, and rename the folder to its final name."""
        partial = self.directory / f"{step}.partial"
        final, replaced = self.directory / f"{step}", self.directory / f"{step}.replaced"
        if jax.process_count() == 1:
            _prove(partial, leaves)
        else:
            check_written(partial, leaves)
        write_manifest(partial, leaves, score, self._origin)
        if final.exists():
            final.rename(replaced)
        partial.rename(final)
        shutil.rmtree(replaced, ignore_errors=True)
        self._prune(step)

    def _prune(self, step: int) -> None:
        folders = step_folders(self.directory)
        overtaken = sorted(other for other in folders if other <= step)
        for other in set(overtaken[: -self.keep]) - {self._best(folders)}:
            removed = self.directory / f"{other}.removed"
            folders[other].rename(removed)
            shutil.rmtree(removed, ignore_errors=True)


def _prove(folder: Path, leaves: Mapping[str, np.ndarray]) -> None:
    """Read the arrays back through the public path and compare them bit for bit."""
    arrays = read_arrays(folder, {name: describe(leaf) for name, leaf in leaves.items()})
    for name, leaf in leaves.items():
        if arrays[name].tobytes() != leaf.tobytes():
            raise CheckpointError(f"{name} was read back with other values than were written.")
