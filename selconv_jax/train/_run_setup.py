"""A run as all its processes open it: of one configuration, one data set, one directory, one checkpoint."""

import contextlib
import dataclasses
import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from selconv_jax.data._dataset import DatasetInfo, ImageData
from selconv_jax.data._loading import open_data
from selconv_jax.data._stream import ImageSource, StreamedData
from selconv_jax.errors import CheckpointError, ConfigError, DataError
from selconv_jax.train._checkpoints.checkpoint import CheckpointStore, Restored
from selconv_jax.train._config import Config, dump_config
from selconv_jax.train._config_changes import origin_of, with_changes
from selconv_jax.train._distributed.agreement import exchange, is_first, require_same, software, together
from selconv_jax.train._state import TrainState
from selconv_jax.train._trainer import Trainer
from selconv_jax.train._workdir import CHECKPOINTS, lock, lock_mark, read_config

__all__ = [
    "Choice",
    "best_meaning",
    "claimed",
    "find_checkpoint",
    "open_store",
    "prepare",
    "prepare_again",
    "read_again",
    "refuse_skipped",
    "restore",
    "restore_run",
    "skipped_checkpoints",
]

_SAMPLED_IMAGES = 100
_SHARING_SECONDS = 10.0  # what a file system may take to show one machine what another has written


def prepare(config: Config) -> tuple[Trainer, ImageData | StreamedData]:
    """Images and compiled functions of a run, once all processes have found them and agree.

    Args:
        config: The run.

    Returns:
        Its compiled functions, and its images.

    Raises:
        SelconvError: A user-fixable error, on every process.
    """

    def of_this_process() -> tuple[Trainer, ImageData | StreamedData]:
        data = open_data(*config.data.source)
        return Trainer(config, data), data

    trainer, data = together(of_this_process)
    facts = "\n".join(
        [str(data.info), *(f"{len(split)} {key} images" for key, split in _splits(data).items())]
    )
    if jax.process_count() > 1:
        facts += "\n" + together(lambda: _sample_digest(data))
    settings = dataclasses.replace(config, data=dataclasses.replace(config.data, directory=None))
    require_same({"software": software(), "configuration": dump_config(settings), "images": facts})
    return trainer, data


def read_again(workdir: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a run that has begun, on every process.

    Args:
        workdir: The directory of the run.
        overrides: ``"key=value"``, of keys that do not change the result.

    Raises:
        SelconvError: There is no run, or a key or value is wrong.
    """
    return together(lambda: with_changes(read_config(workdir), overrides))


def prepare_again(
    config: Config, how: Callable[[Config], tuple[Trainer, ImageData | StreamedData]] | None = None
) -> tuple[Trainer, ImageData | StreamedData]:
    """As `prepare`, or ``how``, of a run that has begun; its images may have gone elsewhere since."""
    try:
        return (how or prepare)(config)
    except DataError as error:
        raise DataError(f"{error} If its folder has moved, add data.directory=FOLDER.") from error


def restore(store: CheckpointStore, trainer: Trainer, step: int | None = None) -> Restored:
    """The same checkpoint on every process; the first one looks which is good."""
    found: Restored | None = None

    def restore_first() -> None:
        nonlocal found
        if is_first():
            found = store.restore(trainer.state_shape(), step)

    together(restore_first)
    chosen = int(exchange("" if found is None else str(found.step))[0])
    return together(lambda: found or store.restore(trainer.state_shape(), chosen))


@contextlib.contextmanager
def claimed(workdir: Path, *, make: bool = False) -> Iterator[None]:
    """Hold the run for the processes of this job; the first one stands for all.

    Args:
        workdir: The directory of the run, the same one for all processes.
        make: Whether to make it.

    Raises:
        ConfigError: Another job holds the run, or the processes do not see one directory.
    """
    require_same({"work directory": os.fspath(workdir.absolute())})
    with contextlib.ExitStack() as stack:
        mark = together(lambda: stack.enter_context(lock(workdir, make=make)) if is_first() else "")
        mark = exchange(mark)[0]
        together(lambda: _await_mark(workdir, mark))
        yield


def _await_mark(workdir: Path, mark: str) -> None:
    """Wait until what the first process left in its directory is seen in this process's."""
    end = time.monotonic() + _SHARING_SECONDS
    while lock_mark(workdir) != mark:
        if time.monotonic() > end:
            raise ConfigError(
                f"the work directory {workdir} of process 0 is not the one here. All processes need one that "
                "they share: choose a --workdir on a file system that all machines see."
            )
        time.sleep(0.1)


def _splits(data: ImageData | StreamedData) -> dict[str, ImageSource]:
    splits: dict[str, ImageSource | None] = {
        "training": data.train,
        "test": data.test,
        "validation": data.validation,
    }
    return {key: split for key, split in splits.items() if split is not None}


def _sample_digest(data: ImageData | StreamedData) -> str:
    """Equal where the images are: a digest of some of them, evenly spaced, as reading all may take long."""
    digest = hashlib.sha256()
    for split in _splits(data).values():
        for place in np.linspace(0, len(split) - 1, min(_SAMPLED_IMAGES, len(split)), dtype=int):
            image, label = split[int(place)]
            digest.update(np.ascontiguousarray(image).tobytes() + str(int(label)).encode())
    return f"digest of {_SAMPLED_IMAGES} images of each split: {digest.hexdigest()[:12]}"


def open_store(config: Config, workdir: Path) -> CheckpointStore:
    """The checkpoints of a run, as many as its configuration keeps."""
    return CheckpointStore(workdir / CHECKPOINTS, keep=config.keep_checkpoints, origin=origin_of(config))


def restore_run(
    workdir: Path, step: int | None = None, overrides: Sequence[str] = ()
) -> tuple[Trainer, DatasetInfo, int, TrainState]:
    """A run as it was at a checkpoint, to be evaluated on as many of its devices as there are.

    Args:
        workdir: The directory of the run.
        step: The checkpoint; None: the newest, which must not be damaged.
        overrides: As for `read_again`.

    Returns:
        The run's compiled functions, the facts of its images, the step, the state.

    Raises:
        SelconvError: A user-fixable error.
    """
    config = read_again(workdir, overrides)
    trainer, data = prepare_again(_on_present_devices(config))
    with open_store(config, workdir) as store:
        restored = restore(store, trainer, step)
    together(lambda: None if step is not None else refuse_skipped(restored.step, restored.skipped))
    return trainer, data.info, restored.step, restored.state


def _on_present_devices(config: Config) -> Config:
    """The run on fewer devices, where there are fewer: an evaluation does not depend on their number."""
    processes, most = jax.process_count(), jax.device_count()
    for devices in range(min(config.devices or most, most), 0, -1):
        if devices % processes == 0 and config.batch_size % (devices * config.micro_batches) == 0:
            shards = math.gcd(config.parameter_shards, devices // processes)
            return dataclasses.replace(config, devices=devices, parameter_shards=shards)
    return config


def refuse_skipped(step: int | None, skipped: Sequence[str]) -> None:
    """Refuses to take an older checkpoint, or another one for the best, where nobody asked for it.

    Args:
        step: The one that would be taken.
        skipped: What is wrong with others.

    Raises:
        CheckpointError: Something is.
    """
    if skipped:
        raise CheckpointError("\n".join([*skipped, f"To take that of step {step}, add --checkpoint {step}."]))


def best_meaning(workdir: Path) -> str:
    """What the best checkpoint of a run is, in a few words."""
    if read_config(workdir).data.has_validation:
        return "the best on the validation images"
    return "the last: without validation images none is called the best"


@dataclasses.dataclass(frozen=True)
class Choice:
    """A checkpoint of a run.

    Attributes:
        step: Its step.
        skipped: One sentence for each damaged checkpoint that might have been the one.
    """

    step: int
    skipped: tuple[str, ...] = ()


def find_checkpoint(workdir: Path, which: str) -> Choice:
    """The checkpoint that ``"last"``, ``"best"`` or a number means in a run.

    The best is that of the epoch with the highest accuracy on the validation images, the earliest of
    equals. Without such images there is nothing fair to choose by, and the best is the last.

    Args:
        workdir: The directory of the run.
        which: One of the words, or a number.

    Returns:
        For the last the newest that is not damaged.

    Raises:
        SelconvError: It means none, or there is no run.
    """
    config = read_config(workdir)
    with open_store(config, workdir) as store:
        if which == "last" or (which == "best" and not config.data.has_validation):
            found = store.find()
            return Choice(found.step, found.skipped)
        if which == "best":
            if store.best_step is None:
                raise ConfigError(f"{workdir} has no best checkpoint yet: no epoch has been evaluated.")
            return Choice(store.best_step, store.unscored())
        if not which.isdecimal():
            raise ConfigError(f"checkpoint {which!r} is none of last, best, or the number of a step.")
        return Choice(int(which))


def skipped_checkpoints(workdir: Path) -> tuple[str, ...]:
    """What is wrong with the checkpoints of a run that are newer than its newest good one.

    Raises:
        SelconvError: There is no run, or all its checkpoints are damaged.
    """
    with open_store(read_config(workdir), workdir) as store:
        return store.find().skipped if store.steps() else ()
