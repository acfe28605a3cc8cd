"""Where arrays lie: devices that are chosen, rows of a process, kernels in parts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from runs import quiet_console, tiny_config
from selconv_jax.errors import ConfigError
from selconv_jax.train._distributed.sharding import Placement
from selconv_jax.train._loop import train_run
from selconv_jax.train._metrics import read_metrics

pytestmark = pytest.mark.optimized


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        ((99, 8), {}, "devices is 99; there are 8"),
        ((3, 8), {}, "does not divide over 3 devices. Choose a multiple of 3"),
        ((4, 12), {"micro_batches": 2}, "12 images in 2 micro-batches .* Choose a multiple of 8"),
        ((4, 8), {"parameter_shards": 3}, "parameter_shards is 3, which does not divide the 4 devices"),
    ],
)
def test_refusals(arguments, options, said):
    with pytest.raises(ConfigError, match=said):
        Placement.over(*arguments, **options)


def test_rows_of_the_only_process_are_all():
    np.testing.assert_array_equal(Placement.over(4, 8).rows_of_process(8), np.arange(8))


def test_kernels_alone_are_split():
    placement = Placement.over(4, 8, parameter_shards=2)
    shapes = {
        "layer": {"kernel": jnp.zeros((3, 3, 5, 6)), "scale": jnp.zeros(6)},
        "odd": {"kernel": jnp.zeros((1, 1, 4, 7))},
        "indivisible": {"kernel": jnp.zeros((3, 5))},
    }
    sharding = placement.state_sharding(shapes)
    parts = jax.tree.map(lambda leaf, where: where.shard_shape(leaf.shape), shapes, sharding)
    assert parts == {
        "layer": {"kernel": (3, 3, 5, 3), "scale": (6,)},
        "odd": {"kernel": (1, 1, 2, 7)},
        "indivisible": {"kernel": (3, 5)},
    }
    whole = Placement.over(4, 8).state_sharding(shapes)
    assert all(where.is_fully_replicated for where in jax.tree.leaves(whole))


@pytest.mark.slow
def test_a_run_with_split_kernels_is_the_same_run(tmp_path):
    """Its checkpoint, too, is one that any number of devices can go on from."""
    records = []
    for shards in (1, 2):
        config = tiny_config(epochs=2, devices=2)
        console, _ = quiet_console()
        workdir = tmp_path / str(shards)
        assert train_run(dataclasses.replace(config, parameter_shards=shards), workdir, console) == 0
        records.append(read_metrics(workdir / "metrics.jsonl"))
    for one, other in zip(*records, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)
        assert (one["deallocated"], one["reallocated"]) == (other["deallocated"], other["reallocated"])
