"""The training loops of experiments/composition: what they promise about rounds, checkpoints and devices."""

import importlib
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from jax.sharding import AxisType

import selconv_jax

DIRECTORY = Path(__file__).resolve().parent.parent / "experiments" / "composition"


@pytest.fixture(autouse=True)
def promotion():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def script(name, monkeypatch, **settings):
    """One of the scripts as a module, for batches of eight images and with other constants."""
    monkeypatch.syspath_prepend(str(DIRECTORY))
    clothes, module = importlib.import_module("clothes"), importlib.import_module(name)

    def small_batch(step, seed=0):
        return clothes.batch(step, size=8, seed=seed)

    for key, value in {"batch": small_batch, **settings}.items():
        monkeypatch.setattr(module, key, value)
    return module


def test_resumed_from_orbax_the_loop_is_the_unbroken_one(monkeypatch, tmp_path, capsys):
    loop = script("train_state_loop", monkeypatch, EVERY=2)
    whole, losses = loop.train(6, last_round=4)
    _, first = loop.train(4, last_round=4, folder=tmp_path)
    resumed, rest = loop.train(6, last_round=4, folder=tmp_path)
    assert "going on from step 4" in capsys.readouterr().out
    assert first + rest == losses
    chex.assert_trees_all_equal(resumed.variables, whole.variables)
    chex.assert_trees_all_equal(resumed.opt_state, whole.opt_state)
    assert selconv_jax.required_capacity(whole.variables) > 0


def test_a_round_between_updates_drops_the_gradients_of_what_it_rewrote(monkeypatch):
    loop = script("train_state_loop", monkeypatch)
    state, _ = loop.train_step(loop.create(accumulate=2), *loop.batch(0))
    assert int(state.opt_state.mini_step) == 1
    after, report = loop.reallocate(state)
    assert report.reallocated > 0
    masks = selconv_jax.rewritten_mask(after.params, report)

    def expect(mask, before, gradient):
        np.testing.assert_array_equal(gradient, np.where(mask, 0, before))

    jax.tree.map(expect, masks, state.opt_state.acc_grads, after.opt_state.acc_grads)


def test_nnx(monkeypatch):
    loop = script("nnx_loop", monkeypatch, EVERY=2)
    model, losses, reports = loop.train(4)
    assert np.isfinite(losses).all()
    assert [report.channels for report in reports] == [80]
    assert reports[0].reallocated > 0
    assert model.conv2.capacity < 1


def test_averages_start_again_where_a_round_rewrote(monkeypatch):
    loop = script("averaged_parameters", monkeypatch, EVERY=2)
    variables, average, history = loop.train(4, restart=True)
    assert [record["step"] for record in history] == [2, 4]
    assert "after" in history[0]
    assert "after" not in history[1]
    chex.assert_tree_all_finite(average)
    # Of a round by hand, with averages that differ from the variables everywhere.
    rule = selconv_jax.AllocationRule(threshold=0.2)
    variables, report = selconv_jax.reallocate(variables, jax.random.key(9), rule)
    other = jax.tree.map(lambda leaf: leaf + 1, loop.averaged(variables))
    new = loop.restarted(other, variables, report)
    for name, layer in report.layers.items():
        rewritten = np.asarray(layer.reallocated)
        assert rewritten.any()
        for collection, key, axis in (
            ("params", "kernel", 2),
            ("params", "scale", 0),
            ("params", "shift", 0),
            ("batch_stats", "mean", 0),
            ("batch_stats", "var", 0),
        ):
            difference = np.asarray(new[collection][name][key] - variables[collection][name][key])
            by_channel = np.moveaxis(difference, axis, 0).reshape(len(rewritten), -1)
            np.testing.assert_allclose(by_channel[rewritten], 0)
            np.testing.assert_allclose(by_channel[~rewritten], 1, rtol=1e-5)
    chex.assert_trees_all_equal(new["params"]["Dense_0"], other["params"]["Dense_0"])


def test_two_devices_train_as_one(monkeypatch):
    loop = script("data_parallel", monkeypatch, EVERY=2)
    results = []
    for count in (1, 2):
        mesh = jax.make_mesh((count,), ("batch",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])
        results.append(loop.train(4, mesh))
    (one, losses, reports), (two, other_losses, other_reports) = results
    assert reports[0].reallocated > 0
    assert other_reports[0].layers == reports[0].layers
    np.testing.assert_allclose(other_losses, losses, rtol=1e-4)
    chex.assert_trees_all_close(two, one, rtol=1e-3, atol=1e-4)
