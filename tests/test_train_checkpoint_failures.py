"""Saves that are interrupted or fail: what is complete stays so, and the next save works."""

import errno
import logging
import os
import random
import resource
import shutil
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint.experimental import v1 as ocp

from checkpoints import assert_same, names, saved, tiny
from selconv_jax.errors import CheckpointError
from selconv_jax.train._checkpoints.arrays import check_written, is_plain, write_arrays
from selconv_jax.train._checkpoints.checkpoint import CheckpointStore
from selconv_jax.train._checkpoints.manifest import write_manifest

KILLED = """
import sys
import numpy as np
from selconv_jax.train._checkpoints.checkpoint import CheckpointStore

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
    other = types.SimpleNamespace(exc_value=RuntimeError("Event loop is closed"))
    sys.unraisablehook(other)  # however late it comes
    assert reports == []
    other.exc_value = RuntimeError("another one")
    sys.unraisablehook(other)
    assert reports == [other]


def test_writing_in_several_threads_leaves_the_hook_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook = sys.unraisablehook
    monkeypatch.setattr(ocp, "save", lambda *arguments: time.sleep(0.1))
    with ThreadPoolExecutor() as threads:
        for number in range(3):
            threads.submit(write_arrays, tmp_path / str(number), {})
    assert sys.unraisablehook is hook


@pytest.mark.parametrize(
    "name", ["lr=[0.1]", "[!a]", "a*", "a?", "a\\b", "{a,b}", "50%", "s p", "ü", "\udcff"]
)
def test_any_name_of_a_folder(tmp_path: Path, name: str) -> None:
    """Orbax takes some for patterns: then nothing could be restored, or another folder was written."""
    with saved(tmp_path / "ax" / "run", 7):
        pass  # what the pattern a*/run would find, too
    with saved(tmp_path / name / "run", 1, 2) as store:
        assert_same(store.restore(tiny(0)).state, tiny(2))
        assert_same(store.restore(tiny(0), 1).state, tiny(1))
    assert names(tmp_path) == sorted([name, "ax"])


@pytest.mark.parametrize("place", ["missing", "values"])
def test_what_cannot_be_read_back_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    with saved(tmp_path, 1):
        pass
    save = ocp.save

    def lossy(folder: Path, leaves: Any) -> None:
        if place == "values":
            leaves = {**leaves, "value": np.array(leaves["value"] + 1)}
        save(folder, leaves)
        if place == "missing":
            (folder / "state" / "manifest.ocdbt").unlink()

    store = CheckpointStore(tmp_path, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(ocp, "save", lossy)
        store.save(2, tiny(2))
        with pytest.raises(CheckpointError, match=r"Could not write the checkpoint of step 2 in .* read"):
            store.steps()
    assert names(tmp_path) == ["1"]
    store.save(2, tiny(2))
    store.close()
    assert names(tmp_path) == ["2"]


def test_a_checkpoint_that_is_intact_and_yet_cannot_be_read(tmp_path: Path) -> None:
    """As earlier versions have left them: it counts as damaged."""
    with saved(tmp_path, 1, 2):
        pass
    (tmp_path / "2" / "state" / "manifest.ocdbt").unlink()
    (tmp_path / "2" / "manifest.json").unlink()
    write_manifest(tmp_path / "2", tiny(2), None, {})
    with CheckpointStore(tmp_path) as store:
        with pytest.raises(CheckpointError, match="2 is damaged"):
            store.restore(tiny(0), 2)
        assert store.restore(tiny(0)).step == 1


def test_a_folder_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with CheckpointStore(tmp_path / "file") as store, pytest.raises(CheckpointError, match="Not a directory"):
        store.steps()


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


LEAVES = {
    "params/a/kernel": np.arange(6, dtype=np.float32).reshape(2, 3),
    "params/a/half": np.ones((3,), jnp.bfloat16),
    "selectivity/a/gate": np.array([True, False]),
    "step": np.array(7, np.int32),
    "empty": np.zeros((0, 3), np.float32),
}


@pytest.mark.parametrize("name", ["a b", "lr=0.1,x+y;z:@~-", "größe", "deep/er"])
def test_folders_that_orbax_takes_as_they_are_are_read_without_it(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / name / "5.partial"
    assert is_plain(folder)
    folder.parent.mkdir(parents=True)
    write_arrays(folder, LEAVES)
    check_written(folder, LEAVES)
    check_written(folder.relative_to(tmp_path), LEAVES)


def test_what_was_written_is_found_without_orbax(tmp_path):
    """So does one of several processes before a checkpoint is published."""
    write_arrays(tmp_path / "5.partial", LEAVES)
    check_written(tmp_path / "5.partial", LEAVES)
    with pytest.raises(CheckpointError, match=r"params/b cannot be read back: "):
        check_written(tmp_path / "5.partial", {**LEAVES, "params/b": LEAVES["params/a/half"]})
    other = {**LEAVES, "params/a/half": LEAVES["selectivity/a/gate"]}
    with pytest.raises(CheckpointError, match=r"read back as bfloat16\[3\], written as bool\[2\]"):
        check_written(tmp_path / "5.partial", other)


@pytest.mark.parametrize("lost", ["manifest.ocdbt", "d", "ocdbt.process_0"])
def test_stores_that_are_not_whole_are_noticed(tmp_path, lost):
    leaves = {**LEAVES, "params/large": np.arange(100_000, dtype=np.float32)}
    write_arrays(tmp_path / "5.partial", leaves)
    check_written(tmp_path / "5.partial", leaves)
    (tmp_path / "5.partial" / "state" / lost).rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="cannot be read back"):
        check_written(tmp_path / "5.partial", leaves)
