"""Files of the authors' state dicts: there and back, damaged, unsafe; and PyTorch's tensors and files."""

import json
import os
import re
import sys

import chex
import numpy as np
import pytest

from selconv_jax import CheckpointError
from selconv_jax.interop.torch import load_state_dict, save_state_dict, state_dict


@pytest.fixture(scope="module")
def model(small_densenet):
    return small_densenet[0]


@pytest.fixture(scope="module")
def variables(small_densenet):
    return small_densenet[1]


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_files_there_and_back(suffix, tmp_path, model, variables):
    pytest.importorskip("safetensors")
    path = tmp_path / f"weights{suffix}"
    path.write_text("what was there before")
    with pytest.raises(CheckpointError, match="there is a file already"):
        save_state_dict(path, model, variables)
    save_state_dict(path, model, variables, overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    chex.assert_trees_all_equal(load_state_dict(model, str(path)), variables, strict=True)
    with pytest.raises(CheckpointError, match=re.escape(f"{path} does not fit DenseNet: 1 of another")):
        load_state_dict(model.clone(num_classes=3, growth=2, stem="imagenet"), path)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("damage", ["empty", "cut", "other"])
def test_damaged_files(suffix, damage, tmp_path, model, variables):
    pytest.importorskip("safetensors")
    path = tmp_path / f"weights{suffix}"
    save_state_dict(path, model, variables)
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "other": b"weights" * 99}[damage])
    with pytest.raises(CheckpointError, match=f"{re.escape(str(path))}: not a whole {suffix[1:]} file"):
        load_state_dict(model, path)


def test_npz_files_of_other_things(tmp_path, model):
    with (tmp_path / "array.npz").open("wb") as file:
        np.save(file, np.ones(3))
    np.savez(tmp_path / "objects.npz", weights=np.array([{}], object))
    for name in ("array.npz", "objects.npz"):
        with pytest.raises(CheckpointError, match="not a whole npz file of plain arrays"):
            load_state_dict(model, tmp_path / name)


def test_types_that_numpy_does_not_know(tmp_path, model):
    pytest.importorskip("safetensors")
    header = json.dumps({"stem.weight": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "weights.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(CheckpointError, match=r"a type that NumPy does not know \(.*\)\. Save it as float32"):
        load_state_dict(model, path)


def test_missing_and_unknown_files(tmp_path, model, variables):
    with pytest.raises(CheckpointError, match=r"weights\.npz: there is no such file"):
        load_state_dict(model, tmp_path / "weights.npz")
    with pytest.raises(CheckpointError, match=r"the suffix '\.h5' names no known kind .* \.npz, .*\.pth"):
        load_state_dict(model, tmp_path / "weights.h5")
    with pytest.raises(CheckpointError, match=r"the suffix '\.pt' .* use one of \.npz, \.safetensors\."):
        save_state_dict(tmp_path / "weights.pt", model, variables)
    with pytest.raises(CheckpointError, match="there is no folder"):
        save_state_dict(tmp_path / "none" / "weights.npz", model, variables)


def test_a_failed_write_leaves_the_old_file(tmp_path, model, variables, monkeypatch):
    def fail(file, **arrays):
        file.write(b"half of it")
        raise OSError("disk full")

    path = tmp_path / "weights.npz"
    path.write_text("what was there before")
    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(CheckpointError, match=r"cannot be written \(disk full\)"):
        save_state_dict(path, model, variables, overwrite=True)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [
        (path.name, "what was there before")
    ]


def test_packages_that_are_not_installed(tmp_path, model, variables, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    monkeypatch.setitem(sys.modules, "torch", None)
    for name, remedy in {
        "weights.safetensors": "pip install 'selconv-jax[interop]'",
        "best.model": "pip install torch. Or convert .* numpy.savez('best.npz'",
    }.items():
        (tmp_path / name).write_bytes(b"content")
        with pytest.raises(CheckpointError, match=re.escape(remedy).replace(r"\.\*", ".*")):
            load_state_dict(model, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"selconv-jax\[interop\]"):
        save_state_dict(tmp_path / "new.safetensors", model, variables)
    assert not (tmp_path / "new.safetensors").exists()


# With PyTorch.


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.fixture
def tensors(torch, model, variables):
    return {key: torch.from_numpy(value) for key, value in state_dict(model, variables).items()}


def test_tensors_are_arrays(torch, model, variables, tensors):
    chex.assert_trees_all_equal(load_state_dict(model, tensors), variables, strict=True)
    narrow = {key: value.bfloat16() if value.is_floating_point() else value for key, value in tensors.items()}
    loaded = load_state_dict(model, narrow)
    wanted = narrow["classifier.weight"].float().numpy().T
    np.testing.assert_array_equal(loaded["params"]["classifier"]["linear"]["kernel"], wanted)


@pytest.mark.parametrize(
    "name", ["weights.pt", "weights.pth", "checkpoint.tar", "best.model", "last.ckpt", "pytorch_model.bin"]
)
@pytest.mark.parametrize("zipped", [True, False])
def test_pytorch_files(name, zipped, tmp_path, torch, model, variables, tensors):
    content = {"state_dict": tensors, "epoch": 3} if name.endswith(".tar") else tensors
    torch.save(content, tmp_path / name, _use_new_zipfile_serialization=zipped)
    chex.assert_trees_all_equal(load_state_dict(model, tmp_path / name), variables, strict=True)


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickles_that_would_run_code_are_refused(tmp_path, torch, model, tensors):
    trap = tmp_path / "trap"
    torch.save({**tensors, "more": RunsCode(trap)}, tmp_path / "unsafe.pt")
    with pytest.raises(CheckpointError, match=r"unsafe\.pt: refused, .* than tensors \((posix|nt)\.mkdir\)"):
        load_state_dict(model, tmp_path / "unsafe.pt")
    assert not trap.exists()


def test_pytorch_files_of_other_things(tmp_path, torch, model):
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "damaged.pt").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="holds a list, not a state dict"):
        load_state_dict(model, tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match=r"damaged\.pt: "):
        load_state_dict(model, tmp_path / "damaged.pt")
