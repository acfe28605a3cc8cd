"""The directory of a run: created once, never overwritten, used by one process at a time."""

import contextlib
import fcntl
import json
import os
import platform
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from shlex import quote
from typing import Any

import jax

from selconv_jax._utils.files import write_atomically, write_json
from selconv_jax._utils.versions import version_of
from selconv_jax.errors import ConfigError
from selconv_jax.train._config import Config, dump_config, load_config

CONFIG = "config.toml"
METRICS = "metrics.jsonl"
ENVIRONMENT = "environment.json"
CHECKPOINTS = "checkpoints"
ROUNDS = "rounds"
_LOCK = ".lock"

# Settings of JAX that decide which random numbers a key gives.
_RANDOM = ("jax_default_prng_impl", "jax_threefry_partitionable")


def default_workdir(config_path: str | os.PathLike[str], parent: str | os.PathLike[str] = "runs") -> Path:
    """Return the first free directory ``runs/NAME``, ``runs/NAME-2``, ... for a configuration file."""
    base = Path(parent) / Path(config_path).stem
    candidate, number = base, 1
    while os.path.lexists(candidate):  # a link to a folder that does not exist is not free
        number += 1
        candidate = base.with_name(f"{base.name}-{number}")
    return candidate


@contextlib.contextmanager
def free_workdir(config_path: str | os.PathLike[str]) -> Iterator[Path]:
    """Reserve the `default_workdir` by creating it; remove it on exit if it is still empty."""
    while True:
        workdir = default_workdir(config_path)
        with _writable(workdir), contextlib.suppress(FileExistsError):
            workdir.mkdir(parents=True)
            break
        if not os.path.lexists(workdir):  # else another process has just made it
            raise ConfigError(
                f"{workdir} cannot be made: {workdir.parent} is a link to a folder that does not exist. "
                "Choose a --workdir."
            )
    try:
        yield workdir
    finally:
        with contextlib.suppress(OSError):
            workdir.rmdir()
            workdir.parent.rmdir()


def check_free(workdir: Path) -> None:
    """Check that a directory, missing or empty, can become that of a new run."""
    # Leftovers of a process that was killed before its run began do no harm.
    with _writable(workdir):
        try:
            names = {entry.name for entry in workdir.iterdir()} - {ENVIRONMENT, _LOCK}
            content = sorted(name for name in names if not (name.startswith(".") and name.endswith(".new")))
        except FileNotFoundError:
            return
    if CONFIG in content:
        raise ConfigError(
            f"{workdir} already holds a run. Go on with it by `selconv resume {quote(str(workdir))}`, "
            "or choose another --workdir."
        )
    if content:
        raise ConfigError(
            f"{workdir} is not empty (it holds {content[0]!r}). Choose another --workdir: a run is never "
            "written over other files."
        )


def create_workdir(workdir: Path, config: Config, images: Mapping[str, str]) -> None:
    """Write configuration, environment and facts of the images of a new run into its locked directory."""
    check_free(workdir)
    with _writable(workdir):
        for left in workdir.glob(".*.new"):
            left.unlink()
        write_json(workdir / ENVIRONMENT, {**_environment(config), "images": dict(images)})
        # Last: a directory with a configuration is a run that can be resumed.
        write_atomically(workdir / CONFIG, dump_config(config))


@contextlib.contextmanager
def _writable(workdir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"the work directory {workdir} cannot be written: {error.strerror}. Choose another --workdir."
        ) from None


def read_environment(workdir: Path) -> dict[str, Any] | None:
    """Read where and with what a run began; None if that is missing or damaged: no result depends on it."""
    try:
        found = json.loads((workdir / ENVIRONMENT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def read_config(workdir: Path) -> Config:
    """Read the configuration of the run in a directory; a `ConfigError` says that it holds none."""
    if not (workdir / CONFIG).is_file():
        raise ConfigError(
            f"{workdir} does not hold a run (there is no {CONFIG} in it). Start one by `selconv train CONFIG "
            f"--workdir {quote(str(workdir))}`."
        )
    return load_config(workdir / CONFIG)


@contextlib.contextmanager
def lock(workdir: Path, *, make: bool = False) -> Iterator[str]:
    """Lock the run for this process; the system releases the lock however the process ends.

    ``make`` creates the directory. Yields a mark that this process leaves in it, see `lock_mark`.

    Raises:
        ConfigError: Another process holds the lock, or the directory cannot be locked.
    """
    with _writable(workdir):
        if make:
            workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / _LOCK).open("ab", buffering=0)
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
        with _writable(workdir):
            file.truncate(0)
            file.write(mark.encode())
        yield mark


def lock_mark(workdir: Path) -> str:
    """Read the mark of the process that holds, or last held, the run; empty if there is none."""
    try:
        return (workdir / _LOCK).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
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
        "random_numbers": random_settings(),
    }


def random_settings() -> dict[str, str]:
    """Return the settings of JAX on which the random numbers of a run depend, by name."""
    return {name: str(getattr(jax.config, name)) for name in _RANDOM}
