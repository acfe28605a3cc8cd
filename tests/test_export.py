"""Exported functions and variables: there and back, in a process without this package, and refusals."""

import functools
import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import selconv_jax
from compactions import NETWORKS, SHAPE, assert_equal_trees, quick_jit
from selconv_jax import CheckpointError, ConfigError, export
from selconv_jax._xla.platforms import target_platform
from selconv_jax.data._augment import normalize
from selconv_jax.models import DenseNet, create_model
from states import perturbed_variables

# Calls exported functions with a batch each, in a process that cannot import this package.
FRESH = """
import sys
sys.modules["selconv_jax"] = None
import numpy as np
from jax import export
for path in sys.argv[1:]:
    function = export.deserialize(bytearray(open(path, "rb").read()))
    assert function.platforms == ("cpu", "cuda", "tpu")
    np.save(path + ".npy", function.call(np.load(path + ".images.npy")))
"""
needs_onnx = pytest.mark.skipif(
    importlib.util.find_spec("jax2onnx") is None, reason="needs the extra `onnx`: jax2onnx and onnxruntime"
)


def evaluation(model, variables):
    return functools.partial(model.apply, jax.device_get(variables), train=False)


def both(model, shape=SHAPE):
    """A network with closed channels and copies, by name: itself and compacted, as functions."""
    variables = perturbed_variables(model, shape, seed=0, closed=0.4, copies=0.3)
    model = model.clone(capacity=selconv_jax.required_capacity(variables))
    plan = selconv_jax.plan_compaction(model, variables, jnp.ones(shape), compare=False)
    return {
        "original": evaluation(model, variables),
        "compact": evaluation(plan.model, plan.take(variables)),
    }


def call_elsewhere(inputs):
    """Calls StableHLO files with their inputs in one fresh process; returns the outputs by path."""
    for path, images in inputs.items():
        np.save(f"{path}.images.npy", images)
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    subprocess.run([sys.executable, "-c", FRESH, *map(str, inputs)], check=True, env=environment)
    return {path: np.load(f"{path}.npy") for path in inputs}


def batch(count, shape=SHAPE, seed=1):
    return np.random.default_rng(seed).normal(size=(count, *shape[1:])).astype(np.float32)


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.usefixtures("device_count")
def test_stablehlo_runs_without_this_package(tmp_path):
    inputs, expected = {}, {}
    for network, images in ((DenseNet(5, (1, 1), growth=4), batch(3)), (NETWORKS["preresnet"], batch(5))):
        for name, function in both(network).items():
            path = tmp_path / f"{type(network).__name__}_{name}.stablehlo"
            export.save_stablehlo(path, function, jax.ShapeDtypeStruct(SHAPE, jnp.float32))
            inputs[path], expected[path] = images, quick_jit(function)(images)
    outputs = call_elsewhere(inputs)
    for path in inputs:
        assert_close(outputs[path], expected[path])
    path = next(iter(inputs))
    assert_close(export.load_stablehlo(path)(inputs[path][:1]), expected[path][:1])


@pytest.mark.usefixtures("device_count")
def test_stablehlo_has_the_formulation_of_each_platform(tmp_path):
    seen = []

    def function(x):
        seen.append(target_platform())
        return x * {"cpu": 1.0, "gpu": 2.0, "tpu": 3.0}[target_platform()]

    export.save_stablehlo(tmp_path / "file", function, jnp.ones(3))
    assert {"cpu", "gpu", "tpu"} == set(seen)
    np.testing.assert_array_equal(export.load_stablehlo(tmp_path / "file")(np.ones(2, np.float32)), [1, 1])


@pytest.mark.usefixtures("device_count")
def test_normalization_inside(tmp_path):
    layer = selconv_jax.SelectiveConv(4, (3, 3), capacity=1.0)
    function = evaluation(layer, perturbed_variables(layer, SHAPE, seed=0, closed=0.4, copies=0.3))
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.1)
    pixels = np.random.default_rng(0).integers(0, 256, SHAPE, np.uint8)
    path = tmp_path / "pixels.stablehlo"
    export.save_stablehlo(path, lambda images: function(normalize(images, mean, std)), pixels)
    by_hand = (pixels / 255.0 - np.array(mean)) / np.array(std)
    assert_close(export.load_stablehlo(path)(pixels), function(by_hand.astype(np.float32)))


@pytest.mark.usefixtures("device_count")
def test_nnx_module(tmp_path):
    layer = selconv_jax.nnx.SelectiveConv(3, 4, (3, 3), rngs=nnx.Rngs(0))
    layer.eval()
    export.save_stablehlo(tmp_path / "layer.stablehlo", layer, jnp.ones(SHAPE))
    assert_close(export.load_stablehlo(tmp_path / "layer.stablehlo")(batch(3)), layer(jnp.asarray(batch(3))))
    export.save_safetensors(tmp_path / "layer.safetensors", layer)
    read = export.load_safetensors(tmp_path / "layer.safetensors")
    assert_equal_trees(read, selconv_jax.nnx.linen_variables(layer))


def test_safetensors_there_and_back(tmp_path):
    model = NETWORKS["preresnet"].clone(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    variables = perturbed_variables(model, SHAPE, seed=0, closed=0.4, copies=0.3)
    path = tmp_path / "network.safetensors"
    export.save_safetensors(path, variables, metadata={"step": "3"})
    read = export.load_safetensors(path)
    assert_equal_trees(read, variables)
    assert read["params"]["stem"]["kernel"].dtype == jnp.bfloat16
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata() == {"step": "3"}
        assert "params/block1_layer1/conv1/kernel" in set(file.keys())
    with pytest.raises(ValueError, match=r"\('params', 'a/b'\): rename it"):
        export.save_safetensors(tmp_path / "other.safetensors", {"params": {"a/b": jnp.ones(1)}})
    with pytest.raises(ValueError, match=r"rngs/noise is a .*, not an array of numbers; leave it out"):
        export.save_safetensors(tmp_path / "other.safetensors", {"rngs": {"noise": jax.random.key(0)}})
    with pytest.raises(ConfigError, match=r"metadata is \{'step': 3\}; names and values must be strings"):
        export.save_safetensors(tmp_path / "other.safetensors", {}, metadata={"step": 3})


def test_safetensors_keep_the_types_and_the_order_of_numpy_arrays(tmp_path):
    pytest.importorskip("safetensors")
    arrays = {
        "steps": np.array([2**40]),
        "mean": np.array([1 + 1e-12]),
        "turned": np.arange(6.0).reshape(2, 3).T,
    }
    export.save_safetensors(tmp_path / "arrays.safetensors", {"params": arrays})
    with jax.enable_x64(True):
        read = export.load_safetensors(tmp_path / "arrays.safetensors")["params"]
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array)
        assert read[name].dtype == array.dtype


def test_nothing_is_overwritten_unasked(tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    for save in (export.save_stablehlo, export.save_onnx):
        with pytest.raises(CheckpointError, match="file: there is a file already"):
            save(path, jnp.sin, jnp.ones(3))
    with pytest.raises(CheckpointError, match="file: there is a file already"):
        export.save_safetensors(path, {})
    with pytest.raises(CheckpointError, match="there is no folder"):
        export.save_stablehlo(tmp_path / "missing" / "file", jnp.sin, jnp.ones(3))
    assert path.read_text() == "mine"
    export.save_stablehlo(path, jnp.sin, jnp.ones(3), overwrite=True)
    np.testing.assert_allclose(export.load_stablehlo(path)(np.ones(2, np.float32)), np.sin([1, 1]), rtol=1e-6)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_damaged_files(tmp_path):
    for form in ("stablehlo", "safetensors"):
        load = getattr(export, f"load_{form}")
        with pytest.raises(CheckpointError, match="there is no such file"):
            load(tmp_path / "missing")
        (tmp_path / "damaged").write_bytes(b"abc")
        with pytest.raises(CheckpointError, match=r"damaged: not a whole file of .*Write it again"):
            load(tmp_path / "damaged")


def test_functions_that_cannot_be_exported(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(ConfigError, match="whose first axis is the batch"):
        export.save_stablehlo(path, jnp.sin, 1.0)
    with pytest.raises(ConfigError, match="whose first axis is the batch"):
        export.save_stablehlo(path, lambda: jnp.ones(3))
    with pytest.raises(ConfigError, match=r"cannot be exported for batches of any size: .*batch"):
        export.save_stablehlo(path, lambda x: x if x.shape[0] > 3 else -x, jnp.ones(4))
    # The arrays of a function must be on one device, or on the host.
    spread = jax.sharding.NamedSharding(jax.make_mesh((2,), ("x",)), jax.sharding.PartitionSpec("x"))
    weights = jax.device_put(jnp.ones(4), spread)
    with pytest.raises(ConfigError, match="cannot be exported"):
        export.save_stablehlo(path, lambda x: x * weights, jnp.ones((2, 4)))
    assert not path.exists()


@pytest.mark.parametrize(
    ("package", "form", "extra"),
    [
        ("flatbuffers", "stablehlo", "export"),
        ("jax2onnx", "onnx", "onnx"),
        ("safetensors", "safetensors", "export"),
    ],
)
def test_missing_packages(package, form, extra, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    arguments = ({},) if form == "safetensors" else (jnp.sin, jnp.ones(3))
    message = rf"the format {form} need the package {package}: pip install 'selconv-jax\[{extra}\]'\.$"
    with pytest.raises(ConfigError, match=message):
        getattr(export, f"save_{form}")(tmp_path / "file", *arguments)
    assert list(tmp_path.iterdir()) == []


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize("family", ["densenet_bc", "preresnet"])
def test_onnx_of_tiny_networks(family, tmp_path):
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.1)
    pixels = np.random.default_rng(0).integers(0, 256, (3, *SHAPE[1:]), np.uint8)
    for name, function in both(NETWORKS[family]).items():
        path = tmp_path / f"{name}.onnx"
        export.save_onnx(path, function, jnp.ones(SHAPE), input_names=["images"])
        assert_close(export.load_onnx(path)(batch(5)), quick_jit(function)(batch(5)))

    def normalized(images):
        return function(normalize(images, mean, std))

    export.save_onnx(path, normalized, pixels, overwrite=True)
    assert_close(export.load_onnx(path)(pixels), quick_jit(normalized)(pixels))
    (tmp_path / "damaged").write_bytes(b"abc")
    with pytest.raises(CheckpointError, match="damaged: not a whole file of ONNX"):
        export.load_onnx(tmp_path / "damaged")
    with pytest.raises(ConfigError, match=r"cannot be converted to ONNX: .*batch"):
        export.save_onnx(tmp_path / "other", lambda x: x if x.shape[0] > 3 else -x, jnp.ones(4))


LARGE = (1, 32, 32, 3)


@functools.cache
def large(name):
    return both(create_model(name, 10, variant="selective"), LARGE)


@pytest.mark.slow
@pytest.mark.parametrize("network", ["densenet40", "preresnet164"])
@pytest.mark.parametrize("form", ["stablehlo", pytest.param("onnx", marks=needs_onnx)])
def test_published_networks(network, form, tmp_path):
    images = batch(2, LARGE)
    expected, inputs = {}, {}
    for name, function in large(network).items():
        path = tmp_path / f"{name}.{form}"
        getattr(export, f"save_{form}")(path, function, images)
        inputs[path], expected[path] = images, jax.jit(function)(images)
    if form == "stablehlo":
        outputs = call_elsewhere(inputs)
    else:
        outputs = {path: export.load_onnx(path)(images) for path in inputs}
    for path in inputs:
        np.testing.assert_allclose(outputs[path], expected[path], atol=1e-4 * np.abs(expected[path]).max())
    original, small = (np.asarray(each) for each in expected.values())
    np.testing.assert_allclose(small, original, atol=1e-3 * np.abs(original).max())
    small_size, size = (path.stat().st_size for path in sorted(inputs))
    assert small_size < size
