"""Experiment trackers besides TensorBoard: Weights & Biases, MLflow, or a function of the user's."""

import contextlib
import dataclasses
import importlib
import importlib.util
import os
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from flax import traverse_util

from selconv_jax._utils.files import write_atomically
from selconv_jax.errors import ConfigError
from selconv_jax.train._config import Config

_EXPERIMENT = "selconv-jax"


class Tracker(Protocol):
    """What receives the record of each epoch."""

    def write(self, epoch: int, values: Mapping[str, float]) -> None:
        """Add numbers by name."""

    def close(self) -> None:
        """End the run."""


def check_tracker(name: str | None) -> None:
    """Raise a `ConfigError` if there is no such tracker or function, or its package is not installed."""
    if name is None:
        return
    module, _, function = name.partition(":")
    if not (module and function) and name not in _KNOWN:
        known = ", ".join(f'"{tracker}"' for tracker in _KNOWN)
        raise ConfigError(f'tracker is {name!r}; it must be {known}, or a function as "MODULE:FUNCTION".')
    try:
        found = importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # of the module's package
        found = False
    if not found:
        remedy = f"pip install 'selconv-jax[{name}]', or leave tracker out"
        raise ConfigError(
            f"tracker is {name!r}, but there is no module {module} here: "
            f"{'put it on PYTHONPATH' if function else remedy}."
        )
    if not function:
        return
    try:
        is_function = callable(getattr(importlib.import_module(module), function, None))
    except Exception as error:  # the user's own code may raise anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ConfigError(f"tracker is {name!r}, but importing {module} fails ({reason}).") from error
    if not is_function:
        raise ConfigError(f"tracker is {name!r}, but the module {module} has no function {function!r}.")


def open_tracker(config: Config, workdir: Path, say: Callable[[str], None]) -> Tracker | None:
    """Start tracking a run, or go on with that of a resumed one.

    Args:
        config: The run. A function that its ``tracker`` names is called with the directory and the
            configuration as a nested dictionary, and returns a `Tracker`.
        workdir: Directory of the run.
        say: Called with a message if the tracker fails. It is not used again then, and the run goes on.

    Returns:
        The tracker, which raises nothing; None: the run has none.
    """
    if config.tracker is None:
        return None
    return _Guarded(config.tracker, workdir.absolute(), dataclasses.asdict(config), say)


class _Guarded:
    """Tracker that is given up at its first failure."""

    def __init__(self, name: str, workdir: Path, config: dict[str, Any], say: Callable[[str], None]) -> None:
        self._name, self._say = name, say
        self._tracker: Tracker | None = None
        self._try(lambda: self._open(workdir, config))

    def write(self, epoch: int, values: Mapping[str, float]) -> None:
        if (tracker := self._tracker) is not None:
            self._try(lambda: tracker.write(epoch, values))

    def close(self) -> None:
        if (tracker := self._tracker) is not None:
            self._try(tracker.close)
        self._tracker = None

    def _open(self, workdir: Path, config: dict[str, Any]) -> None:
        module, _, function = self._name.partition(":")
        make = getattr(importlib.import_module(module), function) if function else _KNOWN[self._name]
        self._tracker = make(workdir, config)

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # a tracker's own: it may be anything, and must not stop the run
            self._tracker = None
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            self._say(f"no more records for the tracker {self._name}: {reason}")


class _WeightsAndBiases:
    """A run of Weights & Biases; its environment variables say where: project, entity, mode."""

    def __init__(self, workdir: Path, config: dict[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            dir=workdir,
            name=workdir.name,
            config=config,
            id=_kept(workdir / "wandb.id", lambda: uuid.uuid4().hex),
            resume="allow",
            reinit="create_new",  # a process may train several runs
            settings=wandb.Settings(silent=True, console="off"),
        )

    def write(self, epoch: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=epoch)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    """A run of MLflow; its environment variables say where: tracking server or database, experiment."""

    def __init__(self, workdir: Path, config: dict[str, Any]) -> None:
        import mlflow

        self._client = client = mlflow.MlflowClient()
        self._entities = mlflow.entities
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _EXPERIMENT)

        def create() -> str:
            experiment = client.get_experiment_by_name(name)
            place = client.create_experiment(name) if experiment is None else experiment.experiment_id
            run: str = client.create_run(place, run_name=workdir.name).info.run_id
            flat = traverse_util.flatten_dict(config, sep=".")
            client.log_batch(run, params=[mlflow.entities.Param(key, str(flat[key])) for key in flat])
            return run

        self._run = _kept(workdir / "mlflow.id", create)
        client.update_run(self._run, status="RUNNING")

    def write(self, epoch: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        metrics = [self._entities.Metric(name, value, now, epoch) for name, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._run)


def _kept(file: Path, create: Callable[[], str]) -> str:
    """Return the tracker's name of the run, by which a resumed one is found."""
    with contextlib.suppress(FileNotFoundError):
        return file.read_text(encoding="utf-8").strip()
    identity = create()
    write_atomically(file, identity + "\n")
    return identity


_KNOWN: dict[str, Callable[[Path, dict[str, Any]], Tracker]] = {
    "wandb": _WeightsAndBiases,
    "mlflow": _MLflow,
}
