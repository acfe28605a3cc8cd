"""The directory of a run: who gets it, and what a start that is refused leaves in it."""

import contextlib
import errno
import os
import threading
from pathlib import Path

import pytest

from runs import compiled_once, quiet_console, tiny_config
from selconv_jax import ConfigError
from selconv_jax.train import _run_setup as run_setup
from selconv_jax.train._loop import train_run
from selconv_jax.train._trainer import Trainer
from selconv_jax.train._workdir import create_workdir, free_workdir, lock, read_config

pytestmark = pytest.mark.optimized


class Begun(Exception):
    """Where a run would go on with its first step."""


@pytest.fixture(autouse=True)
def without_steps(monkeypatch):
    monkeypatch.setattr(Trainer, "initial_state", lambda self: (_ for _ in ()).throw(Begun))
    with compiled_once():
        yield


def begin(workdir, seed):
    with pytest.raises(Begun):
        train_run(tiny_config(seed=seed), workdir, quiet_console()[0])


def test_the_configuration_is_that_of_the_run_that_holds_the_directory(tmp_path):
    """Another one comes at every moment before the configuration is written."""
    workdir = tmp_path / "run"
    with lock(workdir, make=True):
        with pytest.raises(ConfigError, match="another process is working on"):
            train_run(tiny_config(seed=2), workdir, quiet_console()[0])
        assert [path.name for path in workdir.iterdir()] == [".lock"]
        create_workdir(workdir, tiny_config(seed=1), {})
        with pytest.raises(ConfigError, match="already holds a run"):
            train_run(tiny_config(seed=2), workdir, quiet_console()[0])
    assert read_config(workdir).seed == 1


def test_one_that_came_between_is_noticed(tmp_path, monkeypatch):
    claimed = run_setup.claimed

    def late(workdir, **options):
        with claimed(workdir, **options):
            create_workdir(workdir, tiny_config(seed=1), {})
        return claimed(workdir, **options)

    monkeypatch.setattr(run_setup, "claimed", late)
    with pytest.raises(ConfigError, match="already holds a run"):
        train_run(tiny_config(seed=2), tmp_path / "run", quiet_console()[0])
    assert read_config(tmp_path / "run").seed == 1


def test_a_refused_start_is_in_nobodys_way(tmp_path, monkeypatch):
    """As that of processes which do not share the directory."""
    with monkeypatch.context() as patch:
        patch.setattr(run_setup, "_SHARING_SECONDS", 0.0)
        patch.setattr(run_setup, "lock_mark", lambda workdir: "of a run before")
        with pytest.raises(ConfigError, match="of process 0 is not the one here"):
            train_run(tiny_config(seed=1), tmp_path / "run", quiet_console()[0])
    assert not (tmp_path / "run" / "config.toml").exists()
    begin(tmp_path / "run", seed=2)
    assert read_config(tmp_path / "run").seed == 2


def test_many_at_once_take_the_next_free_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    barrier, names = threading.Barrier(8), []

    def start():
        barrier.wait()
        with free_workdir("experiments/tiny.toml") as workdir:
            names.append(os.fspath(workdir))
            (workdir / "something").touch()

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(names) == ["runs/tiny", *(f"runs/tiny-{number}" for number in range(2, 9))]


def test_a_free_directory_without_a_run_goes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(ConfigError), free_workdir("tiny.toml") as workdir:
        assert workdir == Path("runs/tiny")
        assert workdir.is_dir()
        raise ConfigError("refused")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "runs").touch()
    with pytest.raises(ConfigError, match="runs/tiny cannot be written"), free_workdir("tiny.toml"):
        pass


def test_links_to_folders_that_do_not_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to("/nonexistent/disk")
    with pytest.raises(ConfigError, match="runs is a link to a folder"), free_workdir("tiny.toml"):
        pass
    (tmp_path / "runs").unlink()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tiny").symlink_to("/nonexistent/disk")
    with free_workdir("tiny.toml") as workdir:
        assert workdir == Path("runs/tiny-2")


def test_a_directory_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / ".lock").symlink_to("/dev/full")
    with (
        pytest.raises(ConfigError, match=r"cannot be written: .*\. Choose another --workdir"),
        lock(tmp_path),
    ):
        pass

    def refuse(path, *arguments, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ConfigError, match=rf"run cannot be written: {os.strerror(errno.EROFS)}\. Choose"):
        train_run(tiny_config(), tmp_path / "run", quiet_console()[0])
