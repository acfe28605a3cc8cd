"""Opening a run on all its processes with the same configuration, data, directory and checkpoint."""

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
from selconv_jax.train._distributed.agreement import exchange, on_first, require_same, software, together
from selconv_jax.train._state import TrainState
from selconv_jax.train._trainer import Trainer
from selconv_jax.train._workdir import (
    CHECKPOINTS,
    lock,
    lock_mark,
    random_settings,
    read_config,
    read_environment,
)

_SAMPLED_IMAGES = 100
_SHARING_SECONDS = 10.0  # for a network file system to show a file that another machine has written


def prepare(config: Config) -> tuple[Trainer, ImageData | StreamedData]:
    """Open the images and make the trainer of a run, and check that all processes agree."""

    def of_this_process() -> tuple[Trainer, ImageData | StreamedData]:
        data = open_data(*config.data.source)
        return Trainer(config, data), data

    trainer, data = together(of_this_process)
    facts = together(lambda: image_facts(data, pixels=True)) if jax.process_count() > 1 else {}
    settings = dataclasses.replace(config, data=dataclasses.replace(config.data, directory=None))
    same = {
        "software": software(),
        "configuration": dump_config(settings),
        "images": "\n".join(map(": ".join, facts.items())),
    }
    require_same(same)
    return trainer, data


def read_again(workdir: Path, overrides: Sequence[str] = ()) -> Config:
    """Read the configuration of an existing run on every process, see `with_changes`."""
    return together(lambda: with_changes(read_config(workdir), overrides))


def prepare_again(
    config: Config, how: Callable[[Config], tuple[Trainer, ImageData | StreamedData]] | None = None
) -> tuple[Trainer, ImageData | StreamedData]:
    """Call `prepare`, or ``how``, for an existing run, whose images may have been moved since."""
    try:
        return (how or prepare)(config)
    except DataError as error:
        raise DataError(f"{error} If its folder has moved, add data.directory=FOLDER.") from error


def restore(store: CheckpointStore, trainer: Trainer, step: int | None = None) -> Restored:
    """Restore the same checkpoint on every process; process 0 finds the newest intact one."""
    found = on_first(lambda: store.restore(trainer.state_shape(), step))
    chosen = int(exchange("" if found is None else str(found.step))[0])
    return together(lambda: found or store.restore(trainer.state_shape(), chosen))


@contextlib.contextmanager
def claimed(workdir: Path, *, make: bool = False) -> Iterator[None]:
    """Lock the run for all processes of this job; process 0 holds the lock. ``make`` creates the directory.

    Raises:
        ConfigError: Another job holds the run, or the processes do not see the same directory.
    """
    require_same({"work directory": os.fspath(workdir.absolute())})
    with contextlib.ExitStack() as stack:
        mark = exchange(on_first(lambda: stack.enter_context(lock(workdir, make=make))) or "")[0]
        together(lambda: _await_mark(workdir, mark))
        yield


def _await_mark(workdir: Path, mark: str) -> None:
    """Wait until this process sees the mark that process 0 left in the directory."""
    end = time.monotonic() + _SHARING_SECONDS
    while lock_mark(workdir) != mark:
        if time.monotonic() > end:
            raise ConfigError(
                f"the work directory {workdir} of process 0 is not the one here. All processes need one that "
                "they share: choose a --workdir on a file system that all machines see."
            )
        time.sleep(0.1)


def image_facts(data: ImageData | StreamedData, pixels: bool = False) -> dict[str, str]:
    """Describe a data set by what must not change during a run: its facts, and a sample of its images.

    The sample is of shapes and labels, and with ``pixels`` also of pixels, which another version of a JPEG
    decoder may compute differently.
    """
    sizes = {f"{key} images": str(len(split)) for key, split in _splits(data).items()}
    # Mean and standard deviation are computed, and so may differ in their last digits.
    info = {**dataclasses.asdict(data.info), "mean": None, "std": None}
    description = hashlib.sha256(repr(info).encode()).hexdigest()[:12]
    return {
        "data set": data.info.name,
        **sizes,
        "description": description,
        "sample": _sample_digest(data, pixels),
    }


def require_images(workdir: Path, data: ImageData | StreamedData) -> None:
    """Check on every process that the images are those that a run began with, if that is recorded."""
    together(lambda: _check_images(workdir, data))


def _check_images(workdir: Path, data: ImageData | StreamedData) -> None:
    began = (read_environment(workdir) or {}).get("images")
    if not isinstance(began, dict):
        return
    now = image_facts(data)
    changed = [
        f"{key}: {began[key]} then, {now[key]} now" for key in now if began.get(key, now[key]) != now[key]
    ]
    if changed:
        raise DataError(
            f"{data.info.name} is not the data set that the run in {workdir} began with ({changed[0]}). Give "
            "the folder of that one, data.directory=FOLDER, or train anew in another --workdir."
        )


def require_surroundings(workdir: Path, config: Config) -> None:
    """Check what else the result of a run depends on, as far as it is recorded where the run began.

    It depends on the random numbers that JAX draws. Where each device normalizes with its own statistics, it
    also depends on the number of devices, which is not in the configuration of a run on all devices.
    """
    began = read_environment(workdir) or {}
    random, devices = began.get("random_numbers"), began.get("devices")
    settings = random if isinstance(random, dict) else {}
    for name, now in random_settings().items():
        if (then := settings.get(name, now)) != now:
            raise ConfigError(
                f"the run in {workdir} began with {name} = {then}, and here it is {now}: JAX would draw "
                f"other random numbers. Set {name.upper()} to what it was."
            )
    depends = config.batch_norm == "per_device" and not config.devices and isinstance(devices, int)
    if depends and devices != jax.device_count():
        raise ConfigError(
            f"the run in {workdir} began on {devices} devices, and here are {jax.device_count()}. With "
            'batch_norm = "per_device" its result depends on their number. Resume it where JAX sees '
            f"{devices}."
        )


def _splits(data: ImageData | StreamedData) -> dict[str, ImageSource]:
    splits: dict[str, ImageSource] = {"training": data.train, "test": data.test}
    return splits if data.validation is None else {**splits, "validation": data.validation}


def _sample_digest(data: ImageData | StreamedData, pixels: bool) -> str:
    """Digest some images, evenly spaced, to compare data sets without reading all of them."""
    digest = hashlib.sha256()
    for split in _splits(data).values():
        for place in np.linspace(0, len(split) - 1, min(_SAMPLED_IMAGES, len(split)), dtype=int):
            image, label = split[int(place)]
            digest.update(f"{image.shape} {int(label)} ".encode())
            if pixels:
                digest.update(np.ascontiguousarray(image).tobytes())
    return f"{digest.hexdigest()[:12]}, of {_SAMPLED_IMAGES} images of each split"


def open_store(config: Config, workdir: Path) -> CheckpointStore:
    """Open the checkpoint store of a run."""
    return CheckpointStore(workdir / CHECKPOINTS, keep=config.keep_checkpoints, origin=origin_of(config))


def restore_run(
    workdir: Path, step: int | None = None, overrides: Sequence[str] = ()
) -> tuple[Trainer, DatasetInfo, int, TrainState]:
    """Restore a run at a checkpoint for evaluation, on fewer devices if some are missing.

    Args:
        workdir: The directory of the run.
        step: The checkpoint; None: the newest, which must not be damaged.
        overrides: ``"key=value"``, of keys that do not change the result.

    Returns:
        The trainer, the description of its images, the step, and the state.

    Raises:
        SelconvError: A user-fixable error.
    """
    config = read_again(workdir, overrides)
    trainer, data = prepare_again(_on_present_devices(config))
    require_images(workdir, data)
    with open_store(config, workdir) as store:
        restored = restore(store, trainer, step)
    if step is None:
        together(lambda: refuse_skipped(restored.step, restored.skipped))
    return trainer, data.info, restored.step, restored.state


def _on_present_devices(config: Config) -> Config:
    """Reduce the run to the devices present: an evaluation does not depend on their number."""
    processes, most = jax.process_count(), jax.device_count()
    for devices in range(min(config.devices or most, most), 0, -1):
        if devices % processes == 0 and config.batch_size % (devices * config.micro_batches) == 0:
            shards = math.gcd(config.parameter_shards, devices // processes)
            return dataclasses.replace(config, devices=devices, parameter_shards=shards)
    return config


def refuse_skipped(step: int, skipped: Sequence[str]) -> None:
    """Refuse to fall back, over damaged checkpoints, to that of a step unless it is requested."""
    if skipped:
        raise CheckpointError("\n".join([*skipped, f"To take that of step {step}, add --checkpoint {step}."]))


def best_meaning(workdir: Path) -> str:
    """Describe in a few words how the best checkpoint of a run is chosen."""
    if read_config(workdir).data.has_validation:
        return "the best on the validation images"
    return "the last: without validation images none is called the best"


def find_checkpoint(workdir: Path, which: str) -> Restored:
    """Find the checkpoint of a run that ``"last"``, ``"best"`` or a step refers to, without its state.

    The last is the newest that is not damaged. The best is that of the epoch with the highest validation
    accuracy, the earliest of ties; without validation images there is no unbiased choice, and it is the last.
    """
    config = read_config(workdir)
    with open_store(config, workdir) as store:
        if which == "last" or (which == "best" and not config.data.has_validation):
            return store.find()
        if which == "best":
            if (best := store.best_step) is None:
                raise ConfigError(f"{workdir} has no best checkpoint yet: no epoch has been evaluated.")
            return Restored(best, None, store.unscored())
        if not which.isdecimal():
            raise ConfigError(f"checkpoint {which!r} is none of last, best, or the number of a step.")
        return Restored(int(which), None, ())


def skipped_checkpoints(workdir: Path) -> tuple[str, ...]:
    """Describe the damaged checkpoints of a run that are newer than its newest intact one."""
    with open_store(read_config(workdir), workdir) as store:
        return store.find().skipped if store.steps() else ()
