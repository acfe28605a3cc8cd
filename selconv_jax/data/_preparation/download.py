"""Download of a data set's official files, with a fast check that it is possible."""

import threading
import urllib.error
import urllib.request
from pathlib import Path

from selconv_jax._utils.console import Progress
from selconv_jax.data._catalog import KnownSet, prepare_command
from selconv_jax.data._records import quiet_tfds
from selconv_jax.errors import DataError


def download(known: KnownSet, data_dir: Path, progress: Progress) -> dict[str, Path]:
    """Download the official files with the download manager of tensorflow-datasets.

    The files stay in ``data_dir/downloads``, where that library looks for them. The error of an address that
    does not answer within seconds explains how to prepare without a download.

    Returns:
        The fetched files, by the last part of their address.
    """
    remedy = (
        f"Get it from {known.origin}, then run: {prepare_command(known.name, data_dir)} "
        "(PATH: the folder or archive)."
    )
    for item in known.downloads:
        reason = unreachable(item.url)
        if reason is not None:
            raise DataError(
                f"{known.name} is not on this machine, and {item.url} cannot be reached ({reason}). {remedy}"
            )

    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download.checksums import UrlInfo

    fetched = {}
    with quiet_tfds():
        try:
            manager = tfds.download.DownloadManager(
                download_dir=data_dir / "downloads",
                dataset_name=known.name,
                url_infos={
                    item.url: UrlInfo(size=item.size, checksum=item.sha256, filename=item.file_name)
                    for item in known.downloads
                },
                force_checksums_validation=True,
            )
        except OSError as error:
            raise DataError(
                f"{data_dir}: cannot be written ({error}). Choose another directory for the prepared sets."
            ) from error
        for item in known.downloads:
            task = f"Fetching {item.file_name} ({item.size / 1e6:.1f} MB)"
            progress(task, 0, 1)
            try:
                fetched[item.file_name] = Path(manager.download(item.url))
            except Exception as error:  # whatever its HTTP library or checksum test raises
                raise DataError(f"{item.url}: the download failed ({error}). {remedy}") from error
            progress(task, 1, 1)
    return fetched


def unreachable(url: str, timeout: float = 4.0) -> str | None:
    """Check whether an address answers within a time limit in seconds; return None if it does, else why not.

    Proxies set in the environment are used.

    Example:
        >>> unreachable("http://localhost:1/file") is None
        False
    """
    answer: list[str | None] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            urllib.request.urlopen(request, timeout=timeout).close()
        except urllib.error.HTTPError as error:
            # Some servers serve a file but reject requests for its headers.
            answer.append(None if error.code in (405, 501) else f"HTTP status {error.code}")
        except Exception as error:
            answer.append(str(getattr(error, "reason", error)))
        else:
            answer.append(None)

    # In a thread, because a name look-up has no timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    return answer[0] if answer else f"no answer within {timeout:g} seconds"
