"""Checkpoints: bit-exact, verified, pruned; what is damaged is noticed."""

import dataclasses
import shutil
import threading
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

from checkpoints import assert_same, files, names, saved, tiny
from selconv_jax.errors import CheckpointError
from selconv_jax.train._checkpoints.checkpoint import CheckpointStore


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


def test_stores_of_one_process_are_written_at_the_same_time(tmp_path):
    """As of seeds that are made together; Orbax itself loses files of such saves."""
    states = [{f"leaf{leaf}": np.full((3, 3), number) for leaf in range(30)} for number in range(4)]
    failures: list[BaseException] = []

    def save(number):
        try:
            with CheckpointStore(tmp_path / str(number)) as store:
                for step in range(1, 6):
                    store.save(step, states[number])
        except CheckpointError as error:
            failures.append(error)

    threads = [threading.Thread(target=save, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    for number, state in enumerate(states):
        with CheckpointStore(tmp_path / str(number)) as store:
            assert_same(store.restore(state).state, state)
