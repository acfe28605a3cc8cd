"""The network that the steps of a run are compiled for."""

import dataclasses
import hashlib
from collections.abc import Hashable
from typing import Any

from selconv_jax.compaction import plan_compaction

__all__ = ["CAPACITIES", "Program", "bucket_program", "frozen_program"]

# Fractions of the channels that a step can be compiled for: few programs, little waste.
CAPACITIES = (0.0, 0.125, 0.25, 0.5, 1.0)


@dataclasses.dataclass(frozen=True)
class Program:
    """A network equivalent to the run's network for the current allocation.

    Attributes:
        key: Equal for equal programs.
        model: Applied to all of the run's variables, also if the program does not use some of them.
        note: End of a sentence on what it is compiled for; empty for the plain network's program.
    """

    key: Hashable
    model: Any = dataclasses.field(compare=False)
    note: str = dataclasses.field(default="", compare=False)


def bucket_program(model: Any, needed: float) -> Program:
    """Return the program for any allocation with up to a number of copies.

    Args:
        model: The network.
        needed: Largest fraction of copies in a layer, from `selconv_jax.required_capacity`.

    Returns:
        The program of the smallest of `CAPACITIES` that holds them.

    Example:
        >>> from selconv_jax import SelectiveConv
        >>> bucket_program(SelectiveConv(8, (3, 3)), needed=0.2).model.capacity
        0.25
    """
    capacity = next(bucket for bucket in CAPACITIES if bucket >= needed)
    note = f" for copies in up to {capacity:.1%} of a layer's channels" if capacity else ""
    return Program(("capacity", capacity), model.clone(capacity=capacity), note)


def frozen_program(model: Any, variables: Any, example: Any) -> Program:
    """Return the program of one allocation, without anything that the allocation does not use.

    Args:
        model: The network.
        variables: Its variables, with values.
        example: Shape and type of a batch, a `jax.ShapeDtypeStruct`.

    Returns:
        A compacted network with the names and shapes of the full one; if no channel is closed and none
        is a copy, the program of the plain network.
    """
    plan = plan_compaction(model.clone(capacity=0.0), variables, example, compare=False)
    if not plan.model.layouts and not plan.model.widths:
        return bucket_program(model, 0.0)
    reads = sum(layout.reads for _, layout in plan.model.layouts)
    arriving = sum(layout.inputs for _, layout in plan.model.layouts)
    digest = hashlib.sha256(repr((plan.model.layouts, plan.model.widths)).encode()).hexdigest()
    return Program(
        ("frozen", digest),
        plan.frozen_model(),
        f" for the frozen allocation ({reads:,} of {arriving:,} input channels kept)",
    )
