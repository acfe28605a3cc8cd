"""Consistency checks and decisions across the processes of a run.

All of these are no-ops in a run of one process. Every process has to call them, in the same order, from the
thread that also starts the computations.
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

import selconv_jax
from selconv_jax._utils.versions import version_of
from selconv_jax.errors import ConfigError, SelconvError

T = TypeVar("T")


class DivergenceError(SelconvError):
    """The processes of a run no longer hold the same state."""


def is_first() -> bool:
    """Return whether this is process 0, which writes records and shows progress."""
    return jax.process_index() == 0


def exchange(text: str) -> list[str]:
    """Gather a text from every process, in the order of the processes."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(data.size))).reshape(-1)
    padded = np.zeros(max(int(sizes.max()), 1), np.uint8)
    padded[: data.size] = data
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(sizes.size, -1)
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


def first_decides(value: bool) -> bool:
    """Broadcast the decision of process 0; the values of the other processes are ignored."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.int32(value)))


def together(action: Callable[[], T]) -> T:
    """Run an action, which must not communicate, on every process, and raise on all if it fails on any.

    Returns:
        This process's value, once the action has succeeded on all.

    Raises:
        SelconvError: On every process, if it failed on any; the message says where and why. A process
            that is alone raises the exception of the action.
    """
    if jax.process_count() == 1:
        return action()
    failure: Exception | None = None
    try:
        value = action()
    except Exception as error:
        failure = error
    known = isinstance(failure, SelconvError)
    text = str(failure) if known else f"{type(failure).__name__}: {failure}"
    problems = exchange("" if failure is None else text)
    if not any(problems):
        return value
    by_text: dict[str, list[int]] = {}
    for process, problem in enumerate(problems):
        if problem:
            by_text.setdefault(problem, []).append(process)
    kind = type(failure) if isinstance(failure, SelconvError) else SelconvError
    # Any other exception may be a bug in the program: keep its traceback.
    raise kind("\n".join(f"{_processes(which)}: {text}" for text, which in by_text.items())) from (
        None if known else failure
    )


def on_first(action: Callable[[], T]) -> T | None:
    """Run an action on process 0 alone, as `together`; the others get None."""
    return together(lambda: action() if is_first() else None)


def require_same(values: Mapping[str, str]) -> None:
    """Check that all processes have the same texts, by the name that users know; compared line by line.

    Raises:
        ConfigError: On every process, if any differs from process 0; the message shows both values.
    """
    for name, value in values.items():
        texts = exchange(value)
        different = [process for process, text in enumerate(texts) if text != texts[0]]
        if different:
            first, other = texts[0].splitlines(), texts[different[0]].splitlines()
            ours, theirs = (
                "; ".join([line for line in lines if line not in others][:3]) or "nothing of it"
                for lines, others in ((first, other), (other, first))
            )
            raise ConfigError(
                f"the processes do not have the same {name}: process 0 has {ours}, {_processes(different)} "
                f"{'has' if len(different) == 1 else 'have'} {theirs}. Start all with the same files, "
                "arguments and versions."
            )


def check_same_state(tree: Any, when: str) -> None:
    """Compare a digest of fully replicated arrays; raise on every process if one differs from process 0."""
    if jax.process_count() == 1:
        return
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        # The local copy on a device of this process.
        digest.update(np.asarray(leaf.addressable_data(0)).tobytes())
    digests = exchange(digest.hexdigest())
    different = [process for process, each in enumerate(digests) if each != digests[0]]
    if different:
        raise DivergenceError(
            f"{when}, {_processes(different)} and process 0 hold different allocations of channels, which "
            "must not happen: a device or its memory may be faulty, or the machines may differ. The run is "
            "stopped; resume from the last checkpoint by `selconv resume`."
        )


_PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "numpy", "orbax-checkpoint", "pillow")
_SETTINGS = (
    "jax_enable_x64",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_default_matmul_precision",
    "jax_numpy_dtype_promotion",
)


def software() -> str:
    """List versions and settings that affect results, and a digest of this package's source, one per line."""
    lines = [f"{name} {version_of(name)}" for name in _PACKAGES]
    lines += [f"{jax.default_backend()} {jax.devices()[0].client.platform_version}".splitlines()[0]]
    lines += [f"{name} = {getattr(jax.config, name)}" for name in _SETTINGS]
    root = Path(selconv_jax.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode() + file.read_bytes())
    source = digest.hexdigest()[:12]
    return "\n".join([f"selconv-jax {version_of('selconv-jax')} (source {source})", *lines])


def _processes(numbers: list[int]) -> str:
    return f"process{'es' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
