"""Folder names of a checkpoint store, cleaning up after interrupted saves, and messages of failed ones.

Folders are published, replaced and removed by renaming only, so a process killed at any moment leaves
nothing incomplete under the name of a step. `<step>.partial` is being written, `<step>.removed` being
deleted; `<step>.replaced` is the previous `<step>` during a new save of the same step, and still counts
as `<step>` if the process died before the new one took its place.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from selconv_jax.errors import CheckpointError

_STEP = re.compile(r"(\d+)(\.replaced)?")
_LEFTOVER = re.compile(r"\d+\.(partial.*|replaced|removed)")


def step_folders(directory: Path) -> dict[int, Path]:
    """Map every step to its folder; a `.replaced` folder counts only if the step has no other."""
    try:
        paths = sorted(directory.iterdir(), reverse=True)  # "5.replaced", then "5"
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read: {error.strerror}.") from None
    return {int(found[1]): path for path in paths if (found := _STEP.fullmatch(path.name))}


def sweep(directory: Path) -> None:
    """Remove the leftovers of killed or failed saves; a `.replaced` that counts gets its name back."""
    for step, folder in step_folders(directory).items():
        folder.rename(directory / f"{step}")
    for path in directory.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def told(step: int, directory: Path) -> Iterator[None]:
    """Turn any exception raised while the checkpoint of a step is written into a `CheckpointError`."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(
            f"Could not write the checkpoint of step {step} in {directory}: {_reason(error)} The checkpoints "
            "before it are intact."
        ) from error


def _reason(error: BaseException) -> str:
    """Describe the problem and its remedy in one or two sentences."""
    number = getattr(error, "errno", None)
    text = str(error).partition(" [tensorstore_spec")[0]
    if number in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in text:
        return "the disk is full. Free some space and resume."
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"the folder is not writable ({text})."
    if jax.process_count() > 1 and re.search(r"barrier|[Tt]imed? ?out|heartbeat|UNAVAILABLE", text):
        return f"another process could not write its part, or has died; see what it says ({text})."
    return f"{text}."
