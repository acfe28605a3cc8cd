"""The recorded speed of a run: that of its training steps, whatever else happens meanwhile."""

import dataclasses
import types

import jax.numpy as jnp

from runs import quiet_console, tiny_config
from selconv_jax.train import _loop as loop
from selconv_jax.train import _trainer as trainer
from selconv_jax.train._checkpoints.checkpoint import CheckpointStore
from selconv_jax.train._loop import train_run
from selconv_jax.train._metrics import read_metrics
from selconv_jax.train._state import Totals


def test_the_speed_is_that_of_the_steps(tmp_path, monkeypatch):
    """By a clock on which a step takes a second, and compilation, rounds and checkpoints many."""
    now = [0.0]
    called = []

    def make_steps(self, model, count):
        def steps(state, *arguments):
            now[0] += count if count in called else 100.0
            called.append(count)
            totals = Totals(jnp.float32(1), jnp.int32(1), jnp.int32(1), jnp.int32(1))
            state = dataclasses.replace(state, step=state.step + count, totals=totals)
            return state, jnp.array([1.0, 1.0, 0.0])

        return steps

    def reallocate(self, state):
        now[0] += 1000.0
        return state, None

    save = CheckpointStore.save

    def save_slowly(self, *arguments):
        now[0] += 10.0
        return save(self, *arguments)

    clock = types.SimpleNamespace(monotonic=lambda: now[0])
    for module in (loop, trainer):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(trainer.Trainer, "_make_steps", make_steps)
    monkeypatch.setattr(trainer.Trainer, "_make_eval", lambda *_: lambda *_: Totals(1.0, 1, 1, 1))
    monkeypatch.setattr(trainer.Trainer, "reallocate", reallocate)
    monkeypatch.setattr(loop.RoundLog, "write", lambda *_: None)
    monkeypatch.setattr(CheckpointStore, "save", save_slowly)
    config = tiny_config(
        epochs=2,
        steps_per_dispatch=3,
        data={"train_split": "train[:400]"},  # eight steps an epoch
        allocation={"every_steps": 4},
    )
    console, _ = quiet_console()
    assert train_run(config, tmp_path / "run", console) == 0
    assert called == [3, 1, 3, 1, 3, 3, 2]
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [record["images_per_second"] for record in records] == [50.0, 50.0]
