"""The examples of experiments/composition run, learn, and re-allocate without changing their output."""

import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

import selconv_jax
from selconv_jax import AllocationRule
from selconv_jax.analysis import count_parameters

DIRECTORY = Path(__file__).resolve().parent.parent / "experiments" / "composition"


def test_every_script_is_run_by_a_test():
    loops = {"averaged_parameters", "data_parallel", "nnx_loop", "train_state_loop"}  # test_training_loops
    shared = {"clothes"}
    here = {"prune_a_network", "residual_block", "sensor_1d", "unet"}
    assert {path.stem for path in DIRECTORY.glob("*.py")} == here | loops | shared


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("residual_block", marks=pytest.mark.slow),
        "sensor_1d",
        pytest.param("unet", marks=pytest.mark.slow),
    ],
)
def test_example(name, capsys):
    script = runpy.run_path(str(DIRECTORY / f"{name}.py"))
    # optax.adam and flax.linen.avg_pool promote integers implicitly.
    with jax.numpy_dtype_promotion("standard"):
        model, variables, x, losses, reports = script["train"](steps=12)
    assert np.isfinite(losses).all()
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    assert sum(report.reallocated for report in reports) > 0
    assert selconv_jax.required_capacity(variables) > 0
    assert f"re-allocated {reports[0].reallocated} of {reports[0].channels}" in capsys.readouterr().out

    # Closing channels may change the output; filling their slots does not.
    key = jax.random.key(9)
    closed, _ = selconv_jax.reallocate(variables, key, AllocationRule(threshold=0.1, top_k=0))
    filled, report = selconv_jax.reallocate(variables, key, AllocationRule(threshold=0.1))
    assert report.reallocated > 0
    with jax.numpy_dtype_promotion("standard"):
        apply = jax.jit(lambda variables: model.apply(variables, x, train=False))
        np.testing.assert_allclose(apply(filled), apply(closed), rtol=1e-5, atol=1e-5)


def test_a_network_is_pruned(capsys):
    script = runpy.run_path(str(DIRECTORY / "prune_a_network.py"))
    model, variables, small, small_variables = script["main"](steps=8)
    assert "3 of 4 convolutions are selective" in capsys.readouterr().out
    assert count_parameters(small_variables["params"]) < count_parameters(variables["params"])
    x = jax.random.uniform(jax.random.key(0), (4, 28, 28, 1))
    np.testing.assert_allclose(
        small.apply(small_variables, x, False), model.apply(variables, x, False), rtol=1e-4, atol=1e-4
    )
