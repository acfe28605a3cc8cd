"""What processes tell each other when something is wrong; prints one line of JSON per case.

Arguments: --coordinator HOST:PORT --process I --processes N.
"""

import json
import sys

import jax
import numpy as np

from selconv_jax.errors import ConfigError, SelconvError
from selconv_jax.train._distributed.agreement import (
    check_same_state,
    exchange,
    first_decides,
    require_same,
    together,
)
from selconv_jax.train._distributed.cluster import Cluster, join
from selconv_jax.train._distributed.sharding import Placement


def refuse(process):
    """Fails on one process only."""
    if process == 1:
        raise ConfigError("there is no folder here.")
    return process


def break_down(process):
    """Fails on one process only, by no error of ours."""
    if process == 2:
        raise PermissionError(13, "Permission denied")


def outcome(action):
    """What an action returns or refuses."""
    try:
        return [True, action()]
    except SelconvError as error:
        return [type(error).__name__, str(error)]


def diverged(process):
    """A state that should be the same on every process and is not."""
    placement = Placement.of(jax.devices())
    where = placement.replicated
    shard = jax.device_put(np.full(3, process), jax.local_devices()[0])
    array = jax.make_array_from_single_device_arrays((3,), where, [shard])
    return {"gate": array}


def main(_coordinator, address, _process, process, _processes, processes):
    """Every case after the other."""
    jax.config.update("jax_platforms", "cpu")
    process = int(process)
    with join(Cluster(address, process, int(processes))):
        same = Placement.of(jax.devices()).replicate({"gate": np.ones(3)})
        cases = {
            "exchange": lambda: exchange("x" * process),
            "first_decides": lambda: first_decides(process == 0),
            "together": lambda: together(lambda: process),
            "refused": lambda: together(lambda: refuse(process)),
            "broken": lambda: together(lambda: break_down(process)),
            "same": lambda: require_same({"configuration": "epochs = 3"}),
            "different": lambda: require_same({"configuration": f"seed = 1\nepochs = {3 + process // 2}"}),
            "same state": lambda: check_same_state(same, "after epoch 1"),
            "diverged": lambda: check_same_state(diverged(process), "after epoch 1"),
        }
        for name, action in cases.items():
            print(json.dumps([name, *outcome(action)]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
