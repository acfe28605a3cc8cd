"""Which channels a layer of a compacted network reads and makes."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["LayerLayout"]


@dataclasses.dataclass(frozen=True)
class LayerLayout:
    """The fixed allocation of a layer: a static constant of the compiled program.

    The layer's own channels, the `reads` of them, are those read directly, then the copies; in a layer with
    groups they are arranged group by group by ``order``. All positions count from 0.

    Attributes:
        inputs: Channels of the array that comes in.
        own: Incoming channel of each directly read one, no channel twice.
        copied: Incoming channel that each copy reads through its shift.
        outputs: Channels that the layer makes; 0: nobody needs it, and it is not computed.
        groups: Groups of the convolution.
        idle: Positions among the reads whose kernel rows are zero and stay zero.
        order: Permutation of ``[own, copied]`` that makes the reads; empty: they are in order.

    Example:
        >>> layout = LayerLayout(inputs=6, own=(0, 1, 4), copied=(4,), outputs=8)
        >>> layout.reads
        4
        >>> LayerLayout.from_json(layout.to_json()) == layout
        True
    """

    inputs: int
    own: tuple[int, ...]
    copied: tuple[int, ...]
    outputs: int
    groups: int = 1
    idle: tuple[int, ...] = ()
    order: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        positions = (*self.own, *self.copied)
        problem = None
        if any(not 0 <= position < self.inputs for position in positions):
            problem = f"a channel is read that the {self.inputs} inputs do not have"
        elif len(set(self.own)) < len(self.own):
            problem = "a channel is read directly twice"
        elif self.order and sorted(self.order) != list(range(self.reads)):
            problem = f"order is no permutation of {self.reads} channels"
        elif any(not 0 <= position < self.reads for position in self.idle):
            problem = f"an idle channel is none of the {self.reads} that are read"
        elif self.groups < 1 or self.outputs % self.groups or self.reads % self.groups:
            problem = f"{self.reads} reads and {self.outputs} outputs do not divide into {self.groups} groups"
        elif self.outputs > 0 and not self.reads:
            problem = "nothing is read"
        if problem:
            raise ValueError(f"the layout of a compacted layer contradicts itself: {problem}.")

    @property
    def reads(self) -> int:
        """Channels that the layer normalizes and convolves."""
        return len(self.own) + len(self.copied)

    @property
    def is_in_place(self) -> bool:
        """Whether the reads are the incoming channels, some of them replaced by copies.

        Then they can be computed without a gather of the own channels, as before compaction.
        """
        if not self.copied or self.reads != self.inputs:
            return False
        order = self.order or range(self.reads)
        return all(order[channel] == number for number, channel in enumerate(self.own))

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and lists; rising neighbours as ``[first, count]``."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            name: _runs(value) if isinstance(value, tuple) else value
            for name, value in fields.items()
            if value != ()
        }

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "LayerLayout":
        """The layout that `to_json` turned into plain values.

        Raises:
            ValueError: It is none.
        """
        try:
            fields = {
                name: _numbers(value) if isinstance(value, list) else int(value)
                for name, value in values.items()
            }
            return LayerLayout(**{"own": (), "copied": (), **fields})  # type: ignore[arg-type]
        except TypeError as error:
            raise ValueError(f"not the layout of a layer ({error}).") from error


def _runs(numbers: Iterable[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == sum(runs[-1]):
            runs[-1][1] += 1
        else:
            runs.append([number, 1])
    return runs


def _numbers(runs: Iterable[Iterable[int]]) -> tuple[int, ...]:
    return tuple(number for first, count in runs for number in range(int(first), int(first) + int(count)))
