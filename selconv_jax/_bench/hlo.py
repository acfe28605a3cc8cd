"""Costs and collectives in the text of a compiled program, from ``compiled.as_text()``."""

import collections
import dataclasses
import math
import re

_ENTRY = re.compile(r"^ENTRY .*?^\}", re.DOTALL | re.MULTILINE)
_NAME = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = ")
_INSTRUCTION = re.compile(
    r"\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<result>\(.*?\)|\S+) (?P<kind>[a-z][\w\-]*)\((?P<operands>.*?)\)"
)
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_PLACE = re.compile(r'op_name="([^"]*)"')
_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_COLLECTIVE = re.compile(rf"%?[\w.\-]+ = (?P<shape>.*?) (?P<kind>{'|'.join(_KINDS)})(?P<start>-start)?\(")
_ARRAY = re.compile(r"[a-z]+(?P<bits>\d*)\w*\[(?P<dims>[\d,]*)\]")
# Instructions for which nothing is launched.
_NO_KERNEL = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all")


@dataclasses.dataclass(frozen=True)
class CostedOperation:
    """An operation of a compiled program, usually a fusion of many."""

    name: str  # in the program's text
    cost: int  # cycles that the compiler estimates, or bytes that are read and written
    place: str  # its origin, such as ``"jit(step)/block1_layer1/conv1/dot_general"``; may be empty


def entry_cycles(text: str) -> list[CostedOperation]:
    """List the operations of the entry computation that have a cycle estimate, in the order of the program.

    Operations inside loops and fusions are not counted separately; copies and collectives have no estimate.
    """
    costs = []
    for line in _entry_lines(text):
        name, cycles = _NAME.match(line), _CYCLES.search(line)
        if name and cycles:
            costs.append(CostedOperation(name[1], int(cycles[1]), _place(line)))
    return costs


def entry_kernels(text: str) -> list[CostedOperation]:
    """List the kernels that the entry computation launches, with the bytes of their operands and results.

    Loops count as one. An operand counts as a whole, even if only a part of it is read.
    """
    kernels, sizes = [], dict[str, int]()
    for line in _entry_lines(text):
        found = _INSTRUCTION.match(line)
        if found is None:
            continue
        name, kind = found["name"], found["kind"]
        sizes[name] = sum(_sizes_of(found["result"]))
        if kind in _NO_KERNEL or kind.endswith("-done"):
            continue
        operands = re.findall(r"%([\w.\-]+)", found["operands"])
        moved = sizes[name] + sum(sizes.get(operand, 0) for operand in operands)
        kernels.append(CostedOperation(name, moved, _place(line)))
    return kernels


def _entry_lines(text: str) -> list[str]:
    entry = _ENTRY.search(text)
    return entry.group().splitlines() if entry else []


def _place(line: str) -> str:
    place = _PLACE.search(line)
    return place[1] if place else ""


def message_sizes(text: str) -> dict[str, list[int]]:
    """List the bytes of the results of all collectives on one device, by kind; loops count once."""
    found = collections.defaultdict(list)
    for match in filter(None, map(_COLLECTIVE.search, text.splitlines())):
        sizes = _sizes_of(match["shape"])
        # The type of an all-gather-start or permute-start includes its operand; the result is the largest.
        is_result = match["start"] is None or match["kind"] == "all-reduce"
        found[match["kind"]].append(sum(sizes) if is_result else max(sizes, default=0))
    return dict(found)


def _sizes_of(types: str) -> list[int]:
    """Return the bytes of every array in a type, such as ``(f32[8,4]{1,0}, pred[2])``."""
    sizes = []
    for array in _ARRAY.finditer(types):
        bits = int(array["bits"] or 8)  # pred has no number
        sizes.append(math.prod(int(side) for side in array["dims"].split(",") if side) * max(bits // 8, 1))
    return sizes
