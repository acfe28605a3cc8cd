"""The directory of a run: made once, never overwritten, used by one process at a time."""

import contextlib
import fcntl
import json
import os
import platform
import uuid
from collections.abc import Iterator
from pathlib import Path

import jax

from selconv_jax.errors import ConfigError
from selconv_jax.train.config import Config, dump_config, load_config
from selconv_jax.versions import version_of

__all__ = [
    "CHECKPOINTS",
    "CONFIG",
    "METRICS",
    "create_workdir",
    "default_workdir",
    "lock",
    "lock_mark",
    "read_config",
]

CONFIG = "config.toml"
METRICS = "metrics.jsonl"
ENVIRONMENT = "environment.json"
CHECKPOINTS = "checkpoints"
_LOCK = ".lock"


def default_workdir(config_path: str | os.PathLike[str], parent: str | os.PathLike[str] = "runs") -> Path:
    """The first free directory ``runs/NAME``, ``runs/NAME-2``, ... for a configuration file."""
    base = Path(parent) / Path(config_path).stem
    candidate, number = base, 1
    while candidate.exists():
        number += 1
        candidate = base.with_name(f"{base.name}-{number}")
    return candidate


def create_workdir(workdir: Path, config: Config) -> None:
    """Makes the directory of a new run and writes what determines the run into it.

    Args:
        workdir: The directory; it may exist if it is empty.
        config: The resolved configuration.

    Raises:
        ConfigError: The directory holds something, or cannot be made.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        # What a process leaves that was killed before its run had begun is in nobody's way.
        unfinished = {ENVIRONMENT, f".{CONFIG}.new"}
        content = sorted({entry.name for entry in workdir.iterdir()} - unfinished)
        if CONFIG in content:
            raise ConfigError(
                f"{workdir} already holds a run. Go on with it by `selconv resume {workdir}`, or choose "
                "another --workdir."
            )
        if content:
            raise ConfigError(
                f"{workdir} is not empty (it holds {content[0]!r}). Choose another --workdir: a run is never "
                "written over other files."
            )
        (workdir / ENVIRONMENT).write_text(json.dumps(_environment(config), indent=2) + "\n")
        # Last and at once: a directory with a configuration is a run that can be resumed.
        temporary = workdir / f".{CONFIG}.new"
        temporary.write_text(dump_config(config), encoding="utf-8")
        temporary.replace(workdir / CONFIG)
    except OSError as error:
        raise ConfigError(f"the work directory {workdir} cannot be written: {error.strerror}.") from None


def read_config(workdir: Path) -> Config:
    """The configuration of the run in a directory.

    Raises:
        ConfigError: The directory does not hold a run.
    """
    if not (workdir / CONFIG).is_file():
        raise ConfigError(
            f"{workdir} does not hold a run (there is no {CONFIG} in it). Start one by `selconv train CONFIG "
            f"--workdir {workdir}`."
        )
    return load_config(workdir / CONFIG)


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[str]:
    """Holds the run for this process; the system lets go of it however the process ends.

    Yields:
        A mark that this process leaves in the directory, see `lock_mark`.

    Raises:
        ConfigError: Another process holds it, or it cannot be held.
    """
    try:
        file = (workdir / _LOCK).open("a")
    except OSError as error:
        raise ConfigError(f"{workdir} cannot be written to: {error.strerror}.") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another process is working on {workdir}. Wait for it or stop it first."
            ) from None
        except OSError as error:
            raise ConfigError(
                f"the file system of {workdir} cannot lock files ({error.strerror}). Choose a --workdir on "
                "one that does, so that two jobs do not work on one run."
            ) from None
        mark = uuid.uuid4().hex
        file.truncate(0)
        file.write(mark)
        file.flush()
        yield mark


def lock_mark(workdir: Path) -> str:
    """The mark of the process that holds, or held, the run; empty without any."""
    try:
        return (workdir / _LOCK).read_text(encoding="utf-8")
    except OSError:
        return ""


def _environment(config: Config) -> dict[str, object]:
    packages = ("selconv-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    devices = jax.devices()
    return {
        "seed": config.seed,
        "versions": {name: version_of(name) for name in packages} | {"python": platform.python_version()},
        "backend": jax.default_backend(),
        "device": devices[0].device_kind,
        "devices": len(devices),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
    }
