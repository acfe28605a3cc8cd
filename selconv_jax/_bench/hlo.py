"""Cycle estimates and collectives in the text of a compiled program, from ``compiled.as_text()``."""

import collections
import dataclasses
import math
import re

__all__ = ["CostedOperation", "entry_costs", "message_sizes"]

_ENTRY = re.compile(r"^ENTRY .*?^\}", re.DOTALL | re.MULTILINE)
_NAME = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = ")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_PLACE = re.compile(r'op_name="([^"]*)"')
_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_COLLECTIVE = re.compile(rf"%?[\w.\-]+ = (?P<shape>.*?) (?P<kind>{'|'.join(_KINDS)})(?P<start>-start)?\(")
_ARRAY = re.compile(r"[a-z]+(?P<bits>\d*)\[(?P<dims>[\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class CostedOperation:
    """An operation of a compiled program, usually a fusion of many."""

    name: str  # in the program's text
    cycles: int  # the compiler's estimate
    place: str  # its origin, such as ``"jit(step)/block1_layer1/conv1/dot_general"``; may be empty


def entry_costs(text: str) -> list[CostedOperation]:
    """List the operations of the entry computation that have a cycle estimate, in the order of the program.

    Operations inside loops and fusions are not counted separately; copies and collectives have no estimate.
    """
    entry = _ENTRY.search(text)
    costs = []
    for line in entry.group().splitlines() if entry else ():
        name, cycles, place = _NAME.match(line), _CYCLES.search(line), _PLACE.search(line)
        if name and cycles:
            costs.append(CostedOperation(name[1], int(cycles[1]), place[1] if place else ""))
    return costs


def message_sizes(text: str) -> dict[str, list[int]]:
    """List the bytes of the results of all collectives on one device, by kind; loops count once."""
    found = collections.defaultdict(list)
    for match in filter(None, map(_COLLECTIVE.search, text.splitlines())):
        sizes = [_bytes(array["bits"], array["dims"]) for array in _ARRAY.finditer(match["shape"])]
        # The type of an all-gather-start or permute-start includes its operand; the result is the largest.
        is_result = match["start"] is None or match["kind"] == "all-reduce"
        found[match["kind"]].append(sum(sizes) if is_result else max(sizes, default=0))
    return dict(found)


def _bytes(bits: str, dims: str) -> int:
    size = int(bits or 8)  # pred has no number
    return math.prod(int(side) for side in dims.split(",") if side) * max(size // 8, 1)
