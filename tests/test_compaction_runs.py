"""The compacted network of a run: evaluated and written by the command line."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import selconv_jax
from runs import compiled_once
from selconv_jax._cli.main import main
from selconv_jax.train._evaluation import compact_run, evaluate_run
from selconv_jax.train._run_setup import restore_run

pytestmark = pytest.mark.optimized


@pytest.fixture(scope="module", autouse=True)
def shared_programs():
    with compiled_once():
        yield


@pytest.fixture
def workdir(reallocated_run):
    return reallocated_run


def test_the_compacted_network_has_the_same_metrics(workdir):
    step, expected = evaluate_run(workdir)
    compacted = compact_run(workdir, evaluate=True)
    assert compacted.step == step == 16
    assert compacted.metrics == pytest.approx(expected, rel=1e-4)
    _, _, _, state = restore_run(workdir)
    states = selconv_jax.layer_states(state.variables).values()
    channels = sum(layer.gate.size for layer in states)
    opened = sum(int(layer.gate.sum()) for layer in states)
    assert compacted.sizes["channels"] == (channels, opened)
    assert opened < channels
    for before, after in compacted.sizes.values():
        assert 0 < after < before


def test_eval_compact_prints_sizes_and_metrics(workdir, capsys):
    assert main(["eval", str(workdir), "--compact"]) == 0
    output = capsys.readouterr().out
    compacted = compact_run(workdir)
    assert compacted.metrics == {}
    assert "checkpoint of step 16, compacted" in output
    before, after = compacted.sizes["parameters"]
    assert f"parameters     {before:,} -> {after:,} ({after / before:.1%})" in output
    assert f"{evaluate_run(workdir)[1]['test_accuracy']:.2%}" in output


def test_compact_writes_a_file(workdir, tmp_path, capsys):
    output = tmp_path / "small.npz"
    assert main(["compact", str(workdir), "--multiple", "8", "--output", str(output)]) == 0
    assert "compacted network in" in capsys.readouterr().out
    model, variables = selconv_jax.load_compact(output)
    assert any(layout.idle for _, layout in model.layouts)
    trainer, _, _, state = restore_run(workdir)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(3, 28, 28, 1)), jnp.float32)
    expected = jax.jit(lambda v: trainer.model.apply(v, images, train=False))(state.variables)
    actual = jax.jit(lambda v: model.apply(v, images, train=False))(variables)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
    assert main(["compact", str(workdir), "--output", str(output)]) == 1
    assert "there is a file already" in capsys.readouterr().err
    assert main(["compact", str(workdir), "--multiple", "0"]) == 1
    assert "multiple is 0" in capsys.readouterr().err
    assert main(["compact", str(workdir)]) == 0
    assert (workdir / "compact.npz").is_file()
