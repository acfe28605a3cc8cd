"""The manifest of a checkpoint: score, origin, leaves, and a digest of every file.

Tensorstore does not check array data, so the digests are compared before anything is used.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from selconv_jax.errors import CheckpointError

_FILE = "manifest.json"


def describe(leaf: Any) -> str:
    """Format dtype and shape of an array, e.g. `float32[3, 3, 16, 32]`."""
    return f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"


def write_manifest(
    folder: Path, leaves: Mapping[str, Any], score: float | None, origin: Mapping[str, Any]
) -> None:
    """Write the manifest of a checkpoint whose other files are complete, and whose arrays are ``leaves``."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    manifest = {
        "score": score,
        "origin": origin,
        "leaves": {name: describe(leaf) for name, leaf in leaves.items()},
        "files": {file.relative_to(folder).as_posix(): _digest(file) for file in files},
    }
    (folder / _FILE).write_bytes(_encode(manifest))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest and check its own digest, but not the files; old ones have no `origin`."""
    try:
        raw = (folder / _FILE).read_bytes()
        manifest: dict[str, Any] = json.loads(raw)
        del manifest["digest"]
        intact = raw == _encode(manifest)
    except OSError as error:
        raise CheckpointError(f"{folder} is damaged: {_FILE}: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise CheckpointError(f"{folder} is damaged: {_FILE} has been altered.")
    return manifest


def verified_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest and check the digest of every file of the checkpoint."""
    manifest = read_manifest(folder)
    for name, digest in manifest["files"].items():
        try:
            intact = _digest(folder / name) == digest
        except OSError as error:
            raise CheckpointError(f"{folder} is damaged: {name}: {error.strerror}.") from error
        if not intact:
            raise CheckpointError(f"{folder} is damaged: {name} has been altered.")
    return manifest


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _encode(manifest: Mapping[str, Any]) -> bytes:
    """Encode a manifest as JSON, with a digest of its other entries."""
    text = json.dumps(manifest, sort_keys=True)
    digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return json.dumps({**manifest, "digest": digest}, sort_keys=True).encode()
