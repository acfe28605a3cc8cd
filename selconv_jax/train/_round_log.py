"""Record of the allocation after every round of a run, one small file per round; only pictures read it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from selconv_jax._utils.files import read_npz, write_atomically
from selconv_jax.train._state import TrainState
from selconv_jax.transforms._layer_tree import layer_states
from selconv_jax.transforms._report import Report


class Round(NamedTuple):
    """The allocation after a round.

    Attributes:
        step: Training steps before the round.
        layers: Arrays of each layer by its path: ``gate``, ``source``, ``shift`` (neither of the latter for
            gate-only layers), and what the round did, ``deallocated`` and ``reallocated``; first axis ``C``.
    """

    step: int
    layers: dict[str, dict[str, NDArray[Any]]]


class RoundLog:
    """Writer of the rounds of a run; a failure ends the record, never the run."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self._folder, self._say = folder, say
        self._failed = False

    def write(self, state: TrainState, report: Report) -> None:
        """Add a round: the state after it, and what it changed."""
        if self._failed:
            return
        arrays: dict[str, Any] = {}
        for path, layer in layer_states(state.variables).items():
            found = {"gate": layer.gate, "source": layer.source, "shift": layer.shift}
            found["deallocated"] = report.layers[path].deallocated
            found["reallocated"] = report.layers[path].reallocated
            arrays |= {f"{path}/{name}": leaf for name, leaf in found.items() if leaf is not None}
        try:
            # Of several processes, the first one might not hold all of a split array.
            arrays = jax.device_get(arrays)
            self._folder.mkdir(exist_ok=True)
            file = self._folder / f"{int(state.step):09d}.npz"
            write_atomically(file, lambda stream: np.savez_compressed(stream, **arrays))
        except (OSError, RuntimeError) as error:
            self._failed = True
            reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
            self._say(f"no more rounds are recorded: {self._folder} cannot be written: {reason}")


def read_rounds(folder: Path) -> list[Round]:
    """Read what `RoundLog` has written, oldest first; files that are damaged are left out."""
    rounds = []
    for file in sorted(folder.glob("[0-9]*.npz")):
        try:
            arrays: Mapping[str, Any] = read_npz(file)
            tree: dict[str, Any] = {}
            for name, array in arrays.items():
                path, _, key = name.rpartition("/")
                tree.setdefault(path, {})[key] = array
            rounds.append(Round(int(file.stem), tree))
        except ValueError:
            continue
    return rounds
