"""The losses of a tiny run step by step, in one process or, as a script, in several.

As a script: FOLDER --coordinator HOST:PORT --process I --processes N. Each process writes FOLDER/I.json.
"""

import dataclasses
import hashlib
import json
import sys
from pathlib import Path

import jax
import numpy as np
from runs import CACHE, tiny_config

from selconv_jax.data.loading import open_data
from selconv_jax.train.trainer import Trainer

STEPS_PER_EPOCH = 15


def config_for(devices, batch_norm):
    """A run of 30 steps, with a round of re-allocation in the middle."""
    config = tiny_config(epochs=2, batch_size=128, devices=devices, allocation={"threshold": 0.3})
    return dataclasses.replace(config, batch_norm=batch_norm)


def trajectory(config, between=lambda state: None):
    """Mean loss and accuracy of the epoch so far after each of 30 steps, and the last state.

    Args:
        config: From `config_for`.
        between: Is given the state after the round.
    """
    trainer = Trainer(config, open_data(config.data.name))
    assert trainer.steps_per_epoch == STEPS_PER_EPOCH
    state, seen = trainer.initial_state(), []
    for epoch in range(2):
        batches = trainer.batches(state, epoch)
        program = trainer.program(state, epoch)
        for _ in range(STEPS_PER_EPOCH):
            state, numbers = trainer.run_steps(state, batches, program, 1)
            seen.append(np.asarray(numbers).tolist())
        if epoch == 0:
            state, report = trainer.reallocate(state)
            assert report.reallocated > 0
            between(state)
    totals = trainer.evaluate(state)
    return seen, int(totals.count), state


def digest(state):
    """Equal for states that are equal bit for bit, as this process holds them."""
    hashed = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        hashed.update(np.asarray(leaf.addressable_data(0)).tobytes())
    return hashed.hexdigest()


def main(folder, _coordinator, address, _process, process, _processes, processes):
    """In one of several processes."""
    from selconv_jax.train.agreement import check_same_state
    from selconv_jax.train.cluster import Cluster, join

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", str(CACHE))
    with join(Cluster(address, int(process), int(processes))):
        result = {}
        for scope in ("global", "per_device"):
            seen, evaluated, state = trajectory(
                config_for(0, scope), lambda state: check_same_state(state.selectivity, "in the middle")
            )
            result[scope] = {"seen": seen, "evaluated": evaluated, "digest": digest(state)}
        Path(folder, f"{process}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
