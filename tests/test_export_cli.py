"""`selconv export`: files of a run, their table, and what bad input gets."""

import json

import jax
import numpy as np
import pytest

import selconv_jax
from runs import compiled_once
from selconv_jax import export
from selconv_jax._cli.main import main
from selconv_jax.train._run_setup import restore_run
from test_export import needs_onnx

pytestmark = pytest.mark.optimized


@pytest.fixture(scope="module", autouse=True)
def shared_programs():
    with compiled_once():
        yield


@pytest.fixture(scope="module")
def workdir(reallocated_run):
    return reallocated_run


@pytest.fixture(scope="module")
def logits_of(workdir):
    """The network's logits of normalized images."""
    trainer, _, _, state = restore_run(workdir)
    model = trainer.model.clone(capacity=selconv_jax.required_capacity(state.variables))
    return jax.jit(lambda images: model.apply(state.variables, images, train=False))


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(3).integers(0, 256, (5, 28, 28, 1), np.uint8)


def normalized(pixels, workdir):
    _, info, _, _ = restore_run(workdir)
    return ((pixels / 255.0 - np.array(info.mean)) / np.array(info.std)).astype(np.float32)


def cells(output, title):
    (line,) = (line for line in output.splitlines() if line.strip().startswith(title))
    return [float(cell.replace(",", "")) for cell in line.strip().removeprefix(title).split()]


def test_compact_and_normalized(workdir, logits_of, pixels, tmp_path, capsys):
    path = tmp_path / "small.stablehlo"
    arguments = ["export", str(workdir), "--format", "stablehlo", "--output", str(path)]
    assert main([*arguments, "--compact", "--normalize"]) == 0
    output = capsys.readouterr().out
    assert f"checkpoint of step 16: compacted network in {path}" in output
    for title in ("parameters", "multiply-adds"):
        original, small = cells(output, title)
        assert 0 < small < original
    assert path.stat().st_size == cells(output, "bytes")[1]
    assert all(difference < 1e-4 for difference in cells(output, "difference"))
    assert all(time > 0 for time in cells(output, "ms per image"))
    expected = logits_of(normalized(pixels, workdir))
    np.testing.assert_allclose(export.load_stablehlo(path)(pixels), expected, rtol=1e-4, atol=1e-4)
    assert [file.name for file in tmp_path.iterdir()] == ["small.stablehlo"]
    before = path.read_bytes()
    assert main(arguments) == 1
    assert "small.stablehlo: there is a file already. Add --overwrite" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert main([*arguments, "--overwrite"]) == 0
    images = normalized(pixels, workdir)
    np.testing.assert_allclose(export.load_stablehlo(path)(images), expected, rtol=1e-4, atol=1e-4)


def test_safetensors(workdir, capsys):
    safetensors = pytest.importorskip("safetensors")
    assert main(["export", str(workdir), "--format", "safetensors"]) == 0
    assert cells(capsys.readouterr().out, "difference") == [0]
    _, _, _, state = restore_run(workdir)
    read = export.load_safetensors(workdir / "network.safetensors")
    assert jax.tree.all(jax.tree.map(np.array_equal, read, dict(state.variables)))
    assert main(["export", str(workdir), "--format", "safetensors", "--compact"]) == 0
    with safetensors.safe_open(workdir / "compact.safetensors", "np") as file:
        notes = json.loads(file.metadata()["selconv_jax"])
    assert notes["step"] == 16
    assert notes["model"]["name"] == "densenet40"
    assert "block1_layer1/conv1" in notes["layouts"]
    arguments = ["export", str(workdir), "--format", "safetensors", "--compact", "--multiple", "8"]
    assert main([*arguments, "--output", str(workdir / "eights.safetensors")]) == 0
    eights = export.load_safetensors(workdir / "eights.safetensors")["params"]
    widths = {layer["conv1"]["scale"].size for layer in eights.values() if "conv1" in layer}
    assert widths
    assert all(width % 8 == 0 for width in widths)


@needs_onnx
@pytest.mark.slow
def test_onnx(workdir, logits_of, pixels, tmp_path, capsys):
    path = tmp_path / "small.onnx"
    arguments = ["export", str(workdir), "--format", "onnx", "--output", str(path)]
    assert main([*arguments, "--compact", "--normalize"]) == 0
    assert all(difference < 1e-4 for difference in cells(capsys.readouterr().out, "difference"))
    expected = logits_of(normalized(pixels, workdir))
    np.testing.assert_allclose(export.load_onnx(path)(pixels), expected, rtol=1e-4, atol=1e-4)


def refusal(capsys, *arguments):
    assert main(["export", *map(str, arguments)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_bad_input(workdir, tmp_path, capsys, monkeypatch):
    assert "no format 'onx'. Did you mean 'onnx'?" in refusal(capsys, workdir, "--format", "onx")
    assert "--normalize is for functions" in refusal(
        capsys, workdir, "--format", "safetensors", "--normalize"
    )
    assert "--multiple is for the compacted network" in refusal(
        capsys, workdir, "--format", "stablehlo", "--multiple", "8"
    )
    assert "does not hold a run" in refusal(capsys, tmp_path, "--format", "stablehlo")
    missing = tmp_path / "missing" / "file"
    assert "there is no folder" in refusal(capsys, workdir, "--format", "stablehlo", "--output", missing)
    for more in ((), ("--overwrite",)):
        error = refusal(capsys, workdir, "--format", "stablehlo", "--output", tmp_path, *more)
        assert f"{tmp_path} is a folder. Choose the name of a file." in error
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    error = refusal(capsys, workdir, "--format", "onnx")
    assert "the package jax2onnx: pip install 'selconv-jax[onnx]'" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("factor", "options"), [(0, []), (np.nan, ["--compact"])], ids=["zeros", "NaN"])
def test_a_file_that_computes_something_else_is_not_written(
    workdir, tmp_path, capsys, monkeypatch, factor, options
):
    path = tmp_path / "network.safetensors"
    path.write_text("mine")

    def damaged(path):
        variables = export.load_safetensors(path)
        if path.stem == "original" and options:
            return variables
        return jax.tree.map(lambda leaf: leaf * factor if leaf.ndim > 1 else leaf, variables)

    monkeypatch.setattr("selconv_jax._cli.export.load_safetensors", damaged)
    error = refusal(capsys, workdir, "--format", "safetensors", "--output", path, "--overwrite", *options)
    assert "not written, as its outputs on random images differ" in error
    assert path.read_text() == "mine"
    assert [file.name for file in tmp_path.iterdir()] == ["network.safetensors"]
