"""The collectives in the text of a compiled program."""

import dataclasses
import math
import re

from selconv_jax._bench.hlo import place_of

__all__ = ["Collective", "collectives"]

_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_OPERATION = re.compile(rf"%?[\w.\-]+ = (?P<shape>.*?) (?P<kind>{'|'.join(_KINDS)})(?P<start>-start)?\(")
_ARRAY = re.compile(r"(?P<type>[a-z]+\d*)\[(?P<dims>[\d,]*)\]")
_BITS = re.compile(r"\d+")


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation.

    Attributes:
        kind: Such as ``"all-reduce"``.
        bytes: Size of its result on one device.
        place: Its origin in the source program, such as ``"jit(step)/shard_map/psum"``; may be empty.
    """

    kind: str
    bytes: int
    place: str


def collectives(text: str) -> list[Collective]:
    """List the collectives of a program, counting those inside loops once.

    Args:
        text: Of a compiled program, from ``compiled.as_text()``.

    Returns:
        In the order of the text.

    Example:
        >>> collectives('%a = (f32[8]{0}, bf16[2,3]) all-reduce(%x, %y), metadata={op_name="psum"}')
        [Collective(kind='all-reduce', bytes=44, place='psum')]
    """
    found = []
    for line in text.splitlines():
        match = _OPERATION.search(line)
        if match is None:
            continue
        sizes = [_bytes(array["type"], array["dims"]) for array in _ARRAY.finditer(match["shape"])]
        # The type of an all-gather-start or permute-start includes its operand; the result is the largest.
        total = max(sizes, default=0) if match["start"] and match["kind"] != "all-reduce" else sum(sizes)
        found.append(Collective(match["kind"], total, place_of(line)))
    return found


def _bytes(kind: str, dims: str) -> int:
    bits = _BITS.search(kind)
    size = int(bits.group()) if bits else 8  # pred
    return math.prod(int(side) for side in dims.split(",") if side) * max(size // 8, 1)
