"""Tiny runs on the embedded images, as the tests of the training loop use them."""

import contextlib
import copy
import dataclasses
import functools
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from selconv_jax.train import _run_setup as run_setup
from selconv_jax.train._checkpoints.checkpoint import CheckpointStore
from selconv_jax.train._config import parse_config
from selconv_jax.train._sweeps import together as sweep_together

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "jax"

# Options of `jax.jit` for programs that run so seldom that compiling them well would take longer.
QUICK = {"xla_backend_optimization_level": 0}

TINY = {
    "epochs": 4,
    "batch_size": 50,
    "eval_batch_size": 50,
    "devices": 1,
    "model": {"name": "densenet40", "options": {"blocks": [1], "growth": 4}},
    "data": {"name": "fashion_mnist_sample", "train_split": "train[:200]", "test_split": "test[:100]"},
    # Without a program of its own for the second half, which takes as long to compile as the others.
    "allocation": {"threshold": 0.4, "compile_frozen": False},
}

ALL_IMAGES = {"train_split": "train", "test_split": "test"}


def tiny_config(**changes):
    """The tiny configuration with other values; sections are merged."""
    tree = {**TINY}
    for key, value in changes.items():
        tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) else value
    return parse_config(tree)


def whole_config():
    """The tiny configuration with all that a run does."""
    return tiny_config(allocation={"compile_frozen": True})


@contextlib.contextmanager
def compiled_once():
    """While entered, runs that differ in their seed alone share what they compiled."""
    trainers, prepare = {}, run_setup.prepare

    def shared(config):
        key = repr(dataclasses.replace(config, seed=0))
        if key not in trainers:
            trainers[key] = prepare(config)
        trainer, data = trainers[key]
        if trainer.config.seed != config.seed:
            _ = trainer._initial  # compiled before there is a copy
            trainer = copy.copy(trainer)
            trainer.config = config
        return trainer, data

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_setup, "prepare", shared)
        patch.setattr(sweep_together, "JointTrainer", functools.cache(sweep_together.JointTrainer))
        yield


def quiet_console():
    """A console that is no terminal, and the text written to it."""
    text = io.StringIO()
    return Console(file=text, width=200), text


def final_arrays(workdir):
    """Step and arrays of the newest checkpoint."""
    with CheckpointStore(Path(workdir) / "checkpoints") as store:
        return store.read()


def assert_same_end(workdir, other):
    """Both runs ended at the same step with bit-identical states."""
    step, arrays = final_arrays(workdir)
    other_step, other_arrays = final_arrays(other)
    assert step == other_step
    assert arrays.keys() == other_arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, other_arrays[name], err_msg=name)


def command(*arguments):
    """A command line of the program, in a process of its own with one CPU device."""
    return [sys.executable, "-m", "selconv_jax", *map(str, arguments)]


def environment():
    """The environment for `command`: one device, compiled quickly, as the tests are, and shared with them."""
    kept = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    cache = {"JAX_COMPILATION_CACHE_DIR": str(CACHE), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return {**kept, **cache, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PLATFORMS": "cpu", "COLUMNS": "200"}


def run_with_compiler(*arguments, packages):
    """Runs a command that needs the compiler of a chip to its end; skips the test without its packages."""
    for name in packages:
        pytest.importorskip(name)
    done = subprocess.run(command(*arguments), env=environment(), capture_output=True, text=True, check=False)
    if "another process holds" in done.stderr:
        pytest.skip("another process holds libtpu")
    assert done.returncode == 0, done.stderr


class StopAfter:
    """A stop request that comes after a number of questions."""

    def __init__(self, questions):
        self.questions, self.signal = questions, None

    exit_code = property(lambda self: 128 + self.signal if self.signal else 0)

    def __bool__(self):
        self.questions -= 1
        if self.questions < 0:
            self.signal = signal.SIGTERM
        return self.signal is not None

    check = __bool__

    def __enter__(self):
        return self

    def __exit__(self, *details):
        return None
