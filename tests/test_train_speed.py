"""The recorded speed of a run: that of its training steps, whatever else happens meanwhile."""

import dataclasses
import types

import jax.numpy as jnp
import numpy as np
import pytest

from runs import quiet_console, tiny_config
from selconv_jax.train import _loop as loop
from selconv_jax.train import _speed as speed
from selconv_jax.train import _trainer as trainer
from selconv_jax.train._checkpoints.checkpoint import CheckpointStore
from selconv_jax.train._config import dump_config
from selconv_jax.train._metrics import read_metrics
from selconv_jax.train._state import Totals
from selconv_jax.train._sweeps.configurations import plan_sweep
from selconv_jax.train._sweeps.runs import run_sweep


@pytest.mark.parametrize("seeds", [[0], [0, 1]])
def test_the_speed_is_that_of_the_steps(seeds, tmp_path, monkeypatch):
    """By a clock on which a step takes a second, and compilation, rounds and checkpoints many.

    Of several seeds in one program, each waits for the rounds and checkpoints of the others.
    """
    now = [0.0]
    called = []

    def make_steps(self, model, count):
        def steps(state, *arguments):
            now[0] += count if count in called else 100.0
            called.append(count)
            one = jnp.ones_like(state.step)  # of each seed
            totals = Totals(one.astype(float), one, one, one)
            state = dataclasses.replace(state, step=state.step + count, totals=totals)
            return state, jnp.stack([one, one, 0 * one], axis=-1)

        return steps

    def reallocate(self, state):
        now[0] += 1000.0
        return state, None

    save = CheckpointStore.save

    def save_slowly(self, *arguments):
        now[0] += 10.0
        return save(self, *arguments)

    clock = types.SimpleNamespace(monotonic=lambda: now[0])
    for module in (loop, speed):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(trainer.Trainer, "_make_steps", make_steps)
    evaluated = Totals(1.0, 1, 1, 1) if len(seeds) == 1 else Totals(*(np.ones(len(seeds)) for _ in range(4)))
    monkeypatch.setattr(trainer.Trainer, "_make_eval", lambda *_: lambda *_: evaluated)
    monkeypatch.setattr(trainer.Trainer, "reallocate", reallocate)
    monkeypatch.setattr(loop.RoundLog, "write", lambda *_: None)
    monkeypatch.setattr(CheckpointStore, "save", save_slowly)
    config = tiny_config(
        epochs=2,
        steps_per_dispatch=3,
        data={"train_split": "train[:400]"},  # eight steps an epoch
        allocation={"every_steps": 4},
    )
    file = tmp_path / "tiny.toml"
    file.write_text(dump_config(config))
    runs = plan_sweep([file], tmp_path / "sweep", seeds=seeds)
    assert run_sweep(runs, quiet_console()[0], together=len(seeds) > 1).code == 0
    assert called == [3, 1, 3, 1, 3, 3, 2]
    for run in runs:
        records = read_metrics(run.workdir / "metrics.jsonl")
        assert [record["images_per_second"] for record in records] == [50.0, 50.0]
