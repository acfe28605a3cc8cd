"""Origins of operations, and cycle estimates of the TPU compiler, in the text of a compiled program."""

import dataclasses
import re

__all__ = ["CostedOperation", "entry_costs", "place_of"]

_ENTRY = re.compile(r"^ENTRY .*?^\}", re.DOTALL | re.MULTILINE)
_NAME = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = ")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_PLACE = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class CostedOperation:
    """An operation of a compiled program, usually a fusion of many.

    Attributes:
        name: In the program's text.
        cycles: The compiler's estimate.
        place: Its origin, such as ``"jit(step)/block1_layer1/conv1/dot_general"``; may be empty.
    """

    name: str
    cycles: int
    place: str


def place_of(line: str) -> str:
    """Return the origin of a line's operation, such as ``"jit(step)/conv1/dot_general"``; may be empty."""
    place = _PLACE.search(line)
    return place[1] if place else ""


def entry_costs(text: str) -> list[CostedOperation]:
    """List the operations of the entry computation that have a cycle estimate.

    Operations inside loops and fusions are not counted separately; copies and collectives have no estimate.

    Args:
        text: Of a compiled program, from ``compiled.as_text()``.

    Returns:
        The operations in the order of the program.

    Example:
        >>> entry_costs('''
        ... ENTRY %main (x: f32[8]) -> f32[8] {
        ...   ROOT %fusion = f32[8] fusion(%x), backend_config={"estimated_cycles":"70"}
        ... }
        ... ''')
        [CostedOperation(name='fusion', cycles=70, place='')]
    """
    entry = _ENTRY.search(text)
    costs = []
    for line in entry.group().splitlines() if entry else ():
        name, cycles = _NAME.match(line), _CYCLES.search(line)
        if name and cycles:
            costs.append(CostedOperation(name[1], int(cycles[1]), place_of(line)))
    return costs
