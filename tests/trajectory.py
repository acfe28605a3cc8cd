"""The losses of a tiny run step by step, in float64, by one process with some devices or by several.

A script: FOLDER DEVICES EXTENT [--coordinator HOST:PORT --process I --processes N]. Each process writes
FOLDER/I.json; one that is alone writes what so many with a device each must agree with. EXTENT is "whole",
or "part" for fewer and shorter trajectories.
"""

import contextlib
import dataclasses
import hashlib
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from runs import CACHE, tiny_config
from selconv_jax.data._dataset import ImageData, Split
from selconv_jax.data._loading import open_data
from selconv_jax.data._stream import StreamedData
from selconv_jax.train import _step as step_module
from selconv_jax.train._distributed.agreement import check_same_state
from selconv_jax.train._distributed.cluster import Cluster, join
from selconv_jax.train._gradients import Seen, accumulated_gradients
from selconv_jax.train._trainer import Trainer

# By extent.
STEPS_PER_EPOCH = {"whole": 15, "part": 5}
TEST_IMAGES = {"whole": 500, "part": 100}


def trajectory(extent, devices, batch_norm, between=lambda state: None, streamed=False):
    """Mean loss and accuracy of the epoch so far after each step of two epochs, with a round in between.

    Args:
        extent: How long it is.
        devices: Their number; 0: all.
        batch_norm: Its scope.
        between: Is given the state after the round.
        streamed: Whether images are read while they are used, each process its share.

    Returns:
        What was seen, what was evaluated, and a digest of the last state, ready for JSON.
    """
    config = tiny_config(
        epochs=2,
        batch_size=32,
        eval_batch_size=75,
        devices=devices,
        allocation={"threshold": 0.3},
        model={"options": {"blocks": [1], "growth": 4}},
    )
    data = open_data(config.data.name)
    train, test = (Split(split.images[::2], split.labels[::2]) for split in (data.train, data.test))
    steps_per_epoch = STEPS_PER_EPOCH[extent]
    train = Split(train.images[: 32 * steps_per_epoch], train.labels[: 32 * steps_per_epoch])
    test = Split(test.images[: TEST_IMAGES[extent]], test.labels[: TEST_IMAGES[extent]])
    data = (StreamedData if streamed else ImageData)(data.info, train, test)
    trainer = Trainer(dataclasses.replace(config, batch_norm=batch_norm), data)
    trainer.model = trainer.model.clone(dtype=jnp.float64, param_dtype=jnp.float64)
    assert trainer.steps_per_epoch == steps_per_epoch
    state, seen = trainer.initial_state(), []
    for epoch in range(2):
        program = trainer.program(state, epoch)
        with contextlib.closing(trainer.batches(state, epoch)) as batches:
            for _ in range(steps_per_epoch):
                state, numbers = trainer.run_steps(state, batches, program, 1)
                seen.append(np.asarray(numbers).tolist())
        if epoch == 0:
            state, report = trainer.reallocate(state)
            assert report.reallocated > 0
            between(state)
    totals = trainer.evaluate(state)
    evaluated = [float(totals.loss), int(totals.correct), int(totals.count)]
    return {"seen": seen, "evaluated": evaluated, "digest": digest(state)}


def check_selectivity(state):
    """Every process has come to the same allocation."""
    check_same_state(state.selectivity, "then")


def digest(state):
    """Equal for states that are equal bit for bit, as this process holds them."""
    hashed = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        hashed.update(np.asarray(leaf.addressable_data(0)).tobytes())
    return hashed.hexdigest()


def simulated(count):
    """`batch_gradients` with batch norm per device, for so many devices, on one, a device after the other."""

    def batch_gradients(model, variables, examples, dropout_key, *, micro_batches, placement, batch_norm):
        assert placement.mesh.size == 1
        assert batch_norm == "per_device"
        results = []
        for number in range(count):

            def part(x, number=number):
                size = x.shape[0] // count
                return x[number * size : (number + 1) * size]

            key = jax.random.fold_in(dropout_key, number)
            own = jax.tree.map(part, examples)
            results.append(accumulated_gradients(model, variables, own, key, micro_batches))

        def mean(*leaves):
            return sum(leaves) / count

        totals = results[0][1].totals
        for _, seen in results[1:]:
            totals = totals + seen.totals
        grads = jax.tree.map(mean, *[grads for grads, _ in results])
        return grads, Seen(jax.tree.map(mean, *[seen.batch_stats for _, seen in results]), totals)

    return batch_gradients


def references(devices, extent):
    """What one process finds with one device, with eight, and with so many that normalize for themselves."""
    found = {
        "one": trajectory(extent, 1, "global"),
        "per_device": trajectory(extent, devices, "per_device"),
    }
    if extent == "part":
        return found
    found["eight"] = trajectory(extent, 8, "global")
    step_module.batch_gradients = simulated(devices)
    return {**found, "simulated": trajectory(extent, 1, "per_device")}


def main(folder, devices, extent, *cluster):
    """In the only process or in one of several."""
    _, address, _, process, _, processes = cluster or (None, None, None, 0, None, 1)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_compilation_cache_dir", str(CACHE))
    if address is None:
        jax.config.update("jax_num_cpu_devices", 8)
        result = references(int(devices), extent)
    else:
        with join(Cluster(address, int(process), int(processes))):
            result = {
                "global": trajectory(extent, 0, "global", check_selectivity),
                "per_device": trajectory(extent, 0, "per_device"),
            }
            if extent == "whole":
                result["streamed"] = trajectory(extent, 0, "global", streamed=True)
    Path(folder, f"{process}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
