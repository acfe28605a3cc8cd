"""Checkpoints: bit-exact, atomic, verified, pruned; and what happens when anything goes wrong."""

import dataclasses
import errno
import logging
import os
import random
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint.experimental import v1 as ocp

from selconv_jax.errors import CheckpointError
from selconv_jax.train.checkpoint import CheckpointStore


@partial(jax.tree_util.register_dataclass, data_fields=["step", "params", "rest"], meta_fields=["name"])
@dataclasses.dataclass(frozen=True)
class State:
    step: Any
    params: Any
    rest: Any
    name: str = "static"


def train_state() -> State:
    """A flax-like dictionary, an optax state (NamedTuples, None), and a leaf of every kind."""
    normal = np.random.default_rng(0).normal
    params = {"Dense_0": {"kernel": jnp.asarray(normal(size=(3, 5)), jnp.float32), "bias": jnp.zeros(5)}}
    optimizer = optax.chain(optax.clip(1.0), optax.sgd(optax.constant_schedule(0.1), 0.9, nesterov=True))
    rest = {
        "optimizer": optimizer.init(params),
        "none": None,
        "gate": jnp.array([True, False, True]),
        "source": jnp.array([-1, 2, 0], jnp.int32),
        "key": jax.random.key_data(jax.random.key(3)),
        "half": jnp.asarray(normal(size=7), jnp.bfloat16),
        "special": jnp.array([np.nan, -0.0, np.inf, 1e-42], jnp.float32),
        "double": normal(size=(2, 2)),  # float64, which JAX would narrow
        "no slots": [jnp.zeros((0, 2)), np.zeros((4, 0), np.int8)],
    }
    return State(jnp.asarray(12, jnp.int32), params, rest)


def tiny(value: int) -> dict[str, np.ndarray]:
    return {"value": np.array(value), "row": np.arange(8) * value}


def assert_same(actual: Any, expected: Any) -> None:
    """The same structure, and every leaf the same to the bit."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, found), wanted in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        name = jax.tree_util.keystr(path)
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), name
        assert np.asarray(found).tobytes() == np.asarray(wanted).tobytes(), name


def saved(directory: Path, *steps: int) -> CheckpointStore:
    """A store with `tiny(step)` at each step, all kept."""
    store = CheckpointStore(directory, keep=99)
    for step in steps:
        store.save(step, tiny(step))
    store.steps()
    return store


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


# Round trip


def test_restores_every_leaf_to_the_bit(tmp_path: Path) -> None:
    state = train_state()
    with CheckpointStore(tmp_path) as store:
        store.save(12, state)
    restored = CheckpointStore(tmp_path).restore(state)
    assert (restored.step, restored.skipped) == (12, ())
    assert_same(restored.state, state)
    assert isinstance(restored.state.rest["gate"], jax.Array)
    assert isinstance(restored.state.rest["double"], np.ndarray)


def test_restores_into_shapes_alone(tmp_path: Path) -> None:
    state = train_state()
    with CheckpointStore(tmp_path) as store:
        store.save(12, state)
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
        assert_same(store.restore(shapes).state, state)


def test_restores_the_shardings_of_the_template(tmp_path: Path) -> None:
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    split = NamedSharding(mesh, PartitionSpec("a", "b"))
    whole = NamedSharding(mesh, PartitionSpec())
    values = np.arange(32.0, dtype=np.float32).reshape(8, 4)
    state = {"split": jax.device_put(values, split), "whole": jax.device_put(values, whole)}
    swapped = {
        "split": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=whole),
        "whole": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=split),
    }
    with CheckpointStore(tmp_path) as store:
        store.save(1, state)
        for template in (state, swapped):
            result = store.restore(template).state
            for name, leaf in result.items():
                assert leaf.sharding == template[name].sharding
                np.testing.assert_array_equal(leaf, values)


def test_an_uncommitted_leaf_stays_uncommitted(tmp_path: Path) -> None:
    state = {"free": jnp.ones(3), "bound": jax.device_put(np.ones(3), jax.devices()[1])}
    with CheckpointStore(tmp_path) as store:
        store.save(1, state)
        result = store.restore(state).state
    assert not result["free"].committed
    assert result["bound"].devices() == {jax.devices()[1]}


def test_saves_the_values_of_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither donated buffers nor a NumPy array written to afterwards change what is saved."""
    changed, write = threading.Event(), ocp.save
    monkeypatch.setattr(ocp, "save", lambda *arguments: changed.wait() and write(*arguments))
    state = {"donated": jnp.arange(5000.0), "host": np.arange(5000.0)}
    increment = jax.jit(lambda x: x + 1, donate_argnums=0)
    with CheckpointStore(tmp_path) as store:
        store.save(1, state)
        for _ in range(3):
            state["donated"] = increment(state["donated"])
        state["host"] += 1
        changed.set()
        result = store.restore(state).state
    np.testing.assert_array_equal(result["donated"], np.arange(5000.0))
    np.testing.assert_array_equal(result["host"], np.arange(5000.0))


def test_orbax_reads_a_checkpoint_by_itself(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path) as store:
        store.save(3, {"params": {"Dense_0": {"kernel": np.eye(2)}}, "list": [np.array(4)]})
    arrays = ocp.load(tmp_path / "3")
    assert sorted(arrays) == ["list/0", "params/Dense_0/kernel"]
    np.testing.assert_array_equal(arrays["params/Dense_0/kernel"], np.eye(2))


# Which ones stay


def test_the_last_and_the_best_stay(tmp_path: Path) -> None:
    scores = {1: float("nan"), 2: 0.7, 3: None, 4: 0.7, 5: 0.6, 6: 0.65, 7: 0.2}
    with CheckpointStore(tmp_path, keep=2) as store:
        assert (store.steps(), store.latest_step, store.best_step) == ([], None, None)
        for step, score in scores.items():
            store.save(step, tiny(step), score)
        assert (store.steps(), store.latest_step, store.best_step) == ([2, 6, 7], 7, 2)
    with CheckpointStore(tmp_path, keep=1) as store:  # the scores survive
        assert store.best_step == 2
        store.save(8, tiny(8), score=0.8)  # the best and the last are one
        assert (store.steps(), store.best_step) == ([8], 8)
        assert_same(store.restore(tiny(0), store.best_step).state, tiny(8))


def test_without_scores_there_is_no_best(tmp_path: Path) -> None:
    with saved(tmp_path, 1, 2) as store:
        assert store.best_step is None


def test_a_run_that_went_back_keeps_what_it_writes(tmp_path: Path) -> None:
    with saved(tmp_path, 10, 20, 30, 40):
        pass
    with CheckpointStore(tmp_path, keep=1) as store:
        store.save(15, tiny(15))
        assert store.steps() == [15, 20, 30, 40]
        store.save(30, tiny(31))
        assert store.steps() == [30, 40]
        assert_same(store.restore(tiny(0), 30).state, tiny(31))


def test_keep_has_to_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep = 0"):
        CheckpointStore(tmp_path, keep=0)


def test_two_leaves_of_one_path_are_refused(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path) as store, pytest.raises(ValueError, match="same path"):
        store.save(1, {"a/b": np.ones(1), "a": {"b": np.ones(1)}})


# Damage


def test_damage_to_any_file_is_noticed(tmp_path: Path) -> None:
    store = saved(tmp_path, 1)
    contents = {file: file.read_bytes() for file in files(tmp_path)}
    assert any(file.parent.name == "d" and len(raw) > 100 for file, raw in contents.items())
    for file, raw in contents.items():
        flipped = [bytearray(raw) for _ in range(0, len(raw), 61)]
        for number, damaged in enumerate(flipped):
            damaged[number * 61] ^= 1 << number % 8
        truncated = [raw[:-1], raw[: len(raw) // 2]] if raw else []
        for damaged in (*map(bytes, flipped), *truncated, raw + b"\n", None):
            file.unlink()
            if damaged is not None:
                file.write_bytes(damaged)
            with pytest.raises(CheckpointError) as error:
                store.restore(tiny(0), 1)
            assert str(tmp_path / "1") in str(error.value)
            assert file.relative_to(tmp_path / "1").as_posix() in str(error.value)
            file.write_bytes(raw)
    assert_same(store.restore(tiny(0), 1).state, tiny(1))


def test_falls_back_to_the_newest_good_one(tmp_path: Path) -> None:
    store = saved(tmp_path, 1, 2, 3, 4)
    (tmp_path / "4" / "manifest.json").write_text("{}")
    shutil.rmtree(tmp_path / "3" / "state")
    left = {step: files(tmp_path / step) for step in ("3", "4")}
    restored = store.restore(tiny(0))
    assert restored.step == 2
    assert_same(restored.state, tiny(2))
    newest, next_one = restored.skipped
    assert newest == f"{tmp_path / '4'} is damaged: manifest.json has been altered."
    assert f"{tmp_path / '3'} is damaged: state/" in next_one
    assert "No such file" in next_one
    assert {step: files(tmp_path / step) for step in ("3", "4")} == left


def test_a_damaged_step_is_replaced(tmp_path: Path) -> None:
    with saved(tmp_path, 1, 2, 3):
        (tmp_path / "3" / "manifest.json").unlink()
    with CheckpointStore(tmp_path, keep=2) as store:
        assert store.restore(tiny(0)).step == 2
        store.save(3, tiny(33), score=1.0)
        assert (store.steps(), store.best_step) == ([2, 3], 3)
        restored = store.restore(tiny(0))
    assert (restored.step, restored.skipped) == (3, ())
    assert_same(restored.state, tiny(33))
    assert names(tmp_path) == ["2", "3"]


def test_the_best_is_sought_among_readable_scores(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path) as store:
        store.save(1, tiny(1), score=0.5)
        store.save(2, tiny(2), score=0.9)
        store.steps()
        (tmp_path / "2" / "manifest.json").write_bytes(b"\xff\x00")
        assert store.best_step == 1


def test_no_good_checkpoint_at_all(tmp_path: Path) -> None:
    empty = tmp_path / "nothing"
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*nothing; found: none"):
        CheckpointStore(empty).restore(tiny(0))
    assert not empty.exists()
    store = saved(tmp_path, 5, 6)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 7 in .*; found: 5, 6\."):
        store.restore(tiny(0), 7)
    for step in ("5", "6"):
        (tmp_path / step / "manifest.json").unlink()
    with pytest.raises(CheckpointError) as error:
        store.restore(tiny(0))
    assert all(f"{tmp_path / step} is damaged: manifest.json" in str(error.value) for step in ("5", "6"))


def test_the_checkpoint_of_another_model(tmp_path: Path) -> None:
    state = {"same": np.ones(2), "shape": np.ones((2, 3)), "dtype": np.ones(4), "gone": np.ones(1)}
    other = {
        "same": np.ones(2),
        "shape": np.ones((3, 3)),
        "dtype": np.ones(4, np.float32),
        **{f"wanted{number}": np.ones(1) for number in range(4)},
    }
    with CheckpointStore(tmp_path) as store:
        store.save(1, state)
        with pytest.raises(CheckpointError) as error:
            store.restore(other)
    message = str(error.value)
    assert f"{tmp_path / '1'} is a checkpoint of another model: 7 of 8 leaves" in message
    assert "shape: expected float64[3, 3], found float64[2, 3]" in message
    assert "dtype: expected float32[4], found float64[4]" in message
    assert "wanted0: expected float64[1], found none" in message
    assert "... and 2 more" in message
    with pytest.raises(CheckpointError, match=r"gone: expected none, found float64\[1\]"):
        store.restore({name: leaf for name, leaf in state.items() if name != "gone"})


# Interrupted and failed saves

KILLED = """
import sys
import numpy as np
from selconv_jax.train.checkpoint import CheckpointStore

store = CheckpointStore(sys.argv[1], keep=2)
for number in range(1000):
    state = {"value": np.array(number), "row": np.arange(8) * number}
    store.save(number // 2, state, score=-number)
    store.steps()
    print(number, flush=True)
"""


def test_a_killed_process_leaves_complete_checkpoints(tmp_path: Path) -> None:
    """Every step is written twice, so a kill may hit a new one, a replacement or a removal."""
    generator = random.Random(0)
    processes = {}
    for name in "ab":
        command = [sys.executable, "-c", KILLED, str(tmp_path / name)]
        processes[tmp_path / name] = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
        )
    for directory, process in processes.items():
        with process:
            assert process.stdout is not None
            for _ in range(generator.randrange(1, 6)):
                number = int(process.stdout.readline())
            time.sleep(generator.random() * 0.1)
            process.kill()
            number = max([number, *map(int, process.stdout.read().split())])
        with CheckpointStore(directory, keep=2) as store:
            for step in store.steps():
                value = int(store.restore(tiny(0), step).state["value"])
                assert value // 2 == step
                assert_same(store.restore(tiny(0), step).state, tiny(value))
            newest = store.restore(tiny(0))
            assert newest.skipped == ()
            assert newest.state["value"] in (number, number + 1)
            store.save(1000, tiny(1000))
        assert all(name.isdigit() for name in names(directory))


class Killed(BaseException):
    """What no `except Exception` stops, as a stand-in for the end of the process."""


@pytest.mark.parametrize("step", [3, 4])  # a replacement, a new one
def test_death_at_any_change_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    with saved(tmp_path / "start", 1, 2, 3):
        pass
    rename, rmtree = Path.rename, shutil.rmtree
    survived = False
    for point in range(99):
        directory = tmp_path / str(point)
        shutil.copytree(tmp_path / "start", directory)
        calls = iter(range(99))

        def dying(change: Any, calls: Iterator[int], point: int, *arguments: Any, **keywords: Any) -> Any:
            if next(calls) == point:
                raise Killed
            return change(*arguments, **keywords)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", lambda *a, c=calls, p=point: dying(rename, c, p, *a))
            patch.setattr(shutil, "rmtree", lambda *a, c=calls, p=point, **k: dying(rmtree, c, p, *a, **k))
            store = CheckpointStore(directory, keep=1)
            store.save(step, tiny(99))
            try:
                store.close()
            except Killed:
                pass
            else:
                survived = True
        with CheckpointStore(directory, keep=1) as store:
            restored = store.restore(tiny(0))
            assert restored.skipped == ()
            assert (restored.step, restored.state["value"]) in ((3, 3), (step, 99))
            for other in store.steps():
                store.restore(tiny(0), other)
            store.save(5, tiny(5))
        assert names(directory) == ["5"]
        if survived:
            break
    assert survived
    assert point > 5


def test_leftovers_count_for_nothing_and_go_with_the_next_save(tmp_path: Path) -> None:
    with saved(tmp_path, 1, 2, 3, 4, 5):
        pass
    (tmp_path / "2").rename(tmp_path / "2.partial")
    (tmp_path / "3").rename(tmp_path / "3.partial.orbax-checkpoint-tmp")
    (tmp_path / "4").rename(tmp_path / "4.removed")
    shutil.copytree(tmp_path / "5", tmp_path / "5.replaced")
    (tmp_path / "1").rename(tmp_path / "1.replaced")  # as if killed between the two renames
    (tmp_path / "notes").mkdir()
    before = names(tmp_path)
    with CheckpointStore(tmp_path) as store:
        assert store.steps() == [1, 5]
        assert_same(store.restore(tiny(0), 1).state, tiny(1))
        assert store.restore(tiny(0)).step == 5
        assert names(tmp_path) == before
        store.save(6, tiny(6))
        assert store.steps() == [1, 5, 6]
    assert names(tmp_path) == ["1", "5", "6", "notes"]


@pytest.mark.parametrize("step", [3, 4])  # a replacement, a new one
@pytest.mark.parametrize("place", ["arrays", "manifest", "publication"])
def test_a_full_disk_at_any_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, step: int
) -> None:
    with saved(tmp_path, 1, 2, 3):
        pass
    owner, method = {"arrays": (ocp, "save"), "manifest": (Path, "write_bytes")}.get(place, (Path, "rename"))
    original = getattr(owner, method)

    def full(path: Path, *arguments: Any) -> Any:
        if method == "rename" and path.suffix != ".partial":
            return original(path, *arguments)
        (path / "state").mkdir(parents=True, exist_ok=True)  # something of it was written
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store = CheckpointStore(tmp_path, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(owner, method, full)
        store.save(step, tiny(99))
        with pytest.raises(CheckpointError) as error:
            store.steps()
    message = f"Could not write the checkpoint of step {step} in {tmp_path}: the disk is full."
    assert str(error.value).startswith(message)
    assert names(tmp_path) == ["1", "2", "3"]
    for earlier in (1, 2, 3):
        assert_same(store.restore(tiny(0), earlier).state, tiny(earlier))
    store.save(step, tiny(99))  # there is room again
    store.close()
    assert names(tmp_path) == [str(step)]
    assert_same(store.restore(tiny(0)).state, tiny(99))


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_really_fails(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operating system refuses the arrays: one sentence, none of Orbax's many tracebacks."""
    reports: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", reports.append)
    large = {str(number): np.random.default_rng(number).normal(size=4000) for number in range(200)}
    with saved(tmp_path, 1, 2) as store:
        with file_size_limit(20_000):
            store.save(3, large)
            with pytest.raises(CheckpointError, match=r"step 3 in .*File too large"):
                store.steps()
        assert_same(store.restore(tiny(0)).state, tiny(2))
        store.save(3, large)
        assert_same(store.restore(large).state, large)
    assert names(tmp_path) == ["1", "2", "3"]
    assert (reports, capfd.readouterr()) == ([], ("", ""))


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    store = CheckpointStore(tmp_path / "file" / "run")
    store.save(1, tiny(1))
    with pytest.raises(CheckpointError, match=r"step 1 in .*file/run: .*Not a directory"):
        store.close()

    def refuse(*arguments: Any, **keywords: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "run")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with (
        pytest.raises(CheckpointError, match="the folder is not writable"),
        CheckpointStore(tmp_path) as store,
    ):
        store.save(1, tiny(1))


def test_an_error_is_raised_once_by_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path)
    monkeypatch.setattr(Path, "write_bytes", lambda *_: 1 / 0)
    store.save(1, tiny(1))
    with pytest.raises(CheckpointError, match="step 1") as error:
        store.save(2, tiny(2))
    assert isinstance(error.value.__cause__, ZeroDivisionError)
    assert store.steps() == []


def test_orbax_is_silent(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    logging.getLogger("absl").setLevel(logging.DEBUG)
    with saved(tmp_path, 1, 1) as store:
        store.restore(tiny(0))
    assert [record for record in caplog.records if "orbax" in record.pathname] == []
    assert capfd.readouterr() == ("", "")
