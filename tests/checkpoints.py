"""Stores of small checkpoints, and what lies in their folders."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from selconv_jax.train._checkpoints.checkpoint import CheckpointStore


def tiny(value: int) -> dict[str, np.ndarray]:
    return {"value": np.array(value), "row": np.arange(8) * value}


def assert_same(actual: Any, expected: Any) -> None:
    """The same structure, and every leaf the same to the bit."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, found), wanted in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        name = jax.tree_util.keystr(path)
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), name
        assert np.asarray(found).tobytes() == np.asarray(wanted).tobytes(), name


def saved(directory: Path, *steps: int) -> CheckpointStore:
    """A store with `tiny(step)` at each step, all kept."""
    store = CheckpointStore(directory, keep=99)
    for step in steps:
        store.save(step, tiny(step))
    store.steps()
    return store


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
