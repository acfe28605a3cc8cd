"""Allocation of one layer, as the pictures and tables read it."""

import dataclasses
import functools

import numpy as np
from numpy.typing import NDArray

from selconv_jax.errors import SelconvError


@dataclasses.dataclass(frozen=True, eq=False)
class LayerAllocation:
    """The input channel that every slot of a layer reads (method, "One selective layer").

    A *slot* is everything that belongs to one input channel, see `selconv_jax.functional.LayerState`. Slot
    ``d`` is in one of three states: it reads its own channel ``d``; it is a copy, which reads channel
    ``source[d]`` shifted by ``shift[d]``; or it is closed and reads nothing.

    Attributes:
        name: Path of the layer in the model.
        gate: ``[C]`` bool, False for closed slots.
        source: ``[C]`` int32, -1 where the slot reads its own channel unshifted; None for a gate-only
            layer, whose closed slots stay closed.
        shift: ``[C, D]`` float, in pixels along each spatial axis, (row, column) for images; None for
            a gate-only layer.
        score: ``[C]`` float, the 2-norm of each column of the normalized damage matrix, if known.
        features: The number of output channels.

    Raises:
        SelconvError: The arrays are inconsistent.

    Example:
        >>> import numpy as np
        >>> from selconv_jax.report import LayerAllocation
        >>> layer = LayerAllocation(
        ...     "conv",
        ...     gate=np.array([True, True, False]),
        ...     source=np.array([-1, 0, -1]),
        ...     shift=np.array([[0.0, 0.0], [1.0, -0.5], [0.0, 0.0]]),
        ...     score=None,
        ...     features=16,
        ... )
        >>> layer.copy
        array([False,  True, False])
    """

    name: str
    gate: NDArray[np.bool_]
    source: NDArray[np.int32] | None
    shift: NDArray[np.floating] | None
    score: NDArray[np.floating] | None
    features: int

    def __post_init__(self) -> None:
        channels = self.gate.shape[0] if self.gate.ndim == 1 else 0
        if channels == 0:
            self._refuse(f"gate must have shape [C] with C of at least 1, not {self.gate.shape}")
        if (self.source is None) != (self.shift is None):
            self._refuse("source and shift belong together: give both, or None for both")
        for key, value in (("source", self.source), ("score", self.score)):
            if value is not None and value.shape != (channels,):
                self._refuse(f"{key} has shape {value.shape}, but gate has {channels} channels")
        if self.source is not None and self.shift is not None:
            if self.shift.ndim != 2 or self.shift.shape[0] != channels or not self.shift.shape[1]:
                self._refuse(f"shift has shape {self.shift.shape}, expected ({channels}, D)")
            wrong = np.flatnonzero((self.source < -1) | (self.source >= channels))
            if wrong.size:
                self._refuse(f"source[{wrong[0]}] is {self.source[wrong[0]]}, outside -1..{channels - 1}")
        for key, value in (("shift", self.shift), ("score", self.score)):
            if value is not None and not np.isfinite(value).all():
                raise SelconvError(
                    f"layer {self.name!r}: {key} holds NaN or infinity, the run has diverged: "
                    "choose an earlier checkpoint."
                )

    def _refuse(self, problem: str) -> None:
        raise SelconvError(
            f"layer {self.name!r}: {problem}. Pass the selectivity collection and the shift of one "
            "and the same layer."
        )

    @property
    def channels(self) -> int:
        """Number ``C`` of input channels, and so of slots."""
        return int(self.gate.shape[0])

    @functools.cached_property
    def copy(self) -> NDArray[np.bool_]:
        """``[C]`` bool: the slot reads a shifted channel, its own or another."""
        return np.zeros_like(self.gate) if self.source is None else self.gate & (self.source >= 0)

    @property
    def own(self) -> NDArray[np.bool_]:
        """``[C]`` bool: the slot reads its own channel, unshifted."""
        return self.gate & ~self.copy

    @property
    def closed(self) -> NDArray[np.bool_]:
        """``[C]`` bool: the slot reads nothing."""
        return ~self.gate

    @functools.cached_property
    def copies_of(self) -> dict[int, NDArray[np.intp]]:
        """Slots that copy each channel, the most copied channel first, ties by index."""
        if self.source is None:
            return {}
        sources, counts = np.unique(self.source[self.copy], return_counts=True)
        return {
            int(source): np.flatnonzero(self.copy & (self.source == source))
            for source in sources[np.argsort(-counts, kind="stable")]
        }
