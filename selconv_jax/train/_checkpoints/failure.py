"""Error messages for checkpoints that could not be written."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from selconv_jax.errors import CheckpointError

__all__ = ["told"]


@contextmanager
def told(step: int, directory: Path) -> Iterator[None]:
    """Turn any exception raised while a checkpoint is written into a `CheckpointError`.

    Args:
        step: Of the checkpoint.
        directory: Of the store.
    """
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
