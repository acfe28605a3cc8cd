"""Suppression of the progress bars and warnings of tensorflow-datasets."""

import contextlib
import logging
from collections.abc import Iterator

__all__ = ["quiet_tfds"]


@contextlib.contextmanager
def quiet_tfds() -> Iterator[None]:
    """Silence tensorflow-datasets inside the block; its errors still raise.

    It draws its own progress bars, and warns through the logger of ``absl``, as of an unprepared data set.
    """
    import absl.logging
    from tensorflow_datasets.core.utils import tqdm_utils

    logger = absl.logging.get_absl_logger()
    level = logger.level
    bars = getattr(tqdm_utils, "_active", True)
    logger.setLevel(logging.CRITICAL)
    tqdm_utils.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            tqdm_utils.enable_progress_bar()
