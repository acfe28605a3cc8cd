"""Folder names of a checkpoint store, and cleaning up after interrupted saves.

Folders are published, replaced and removed by renaming only, so a process killed at any moment leaves
nothing incomplete under the name of a step. `<step>.partial` is being written, `<step>.removed` being
deleted; `<step>.replaced` is the previous `<step>` during a new save of the same step, and still counts
as `<step>` if the process died before the new one took its place.
"""

import re
import shutil
from pathlib import Path

from selconv_jax.errors import CheckpointError

__all__ = ["step_folders", "sweep"]

_STEP = re.compile(r"(\d+)(\.replaced)?")
_LEFTOVER = re.compile(r"\d+\.(partial.*|replaced|removed)")


def step_folders(directory: Path) -> dict[int, Path]:
    """Map every step to its folder; a `.replaced` folder counts only if the step has no other.

    Args:
        directory: Of the store; it may be missing.

    Raises:
        CheckpointError: It cannot be read.
    """
    try:
        paths = sorted(directory.iterdir(), reverse=True)  # "5.replaced", then "5"
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read: {error.strerror}.") from None
    return {int(found[1]): path for path in paths if (found := _STEP.fullmatch(path.name))}


def sweep(directory: Path) -> None:
    """Remove the leftovers of killed or failed saves; a `.replaced` that counts gets its name back.

    Args:
        directory: Of the store.
    """
    for step, folder in step_folders(directory).items():
        folder.rename(directory / f"{step}")
    for path in directory.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
