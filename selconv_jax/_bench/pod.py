"""A run's step and evaluation compiled ahead of time for a TPU pod: memory, collectives, cycles.

The compiler is the real one, of the package libtpu; nothing is run.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from selconv_jax._bench.chips import Chip, chip_of
from selconv_jax._bench.collectives import collectives
from selconv_jax._bench.compilation import Program as Compiled
from selconv_jax._bench.compilation import compile_lowered
from selconv_jax._bench.hlo import entry_costs
from selconv_jax._xla.platforms import tracing_for
from selconv_jax.data._abstract import abstract_data
from selconv_jax.errors import ConfigError
from selconv_jax.train._config import Config
from selconv_jax.train._distributed.sharding import Placement
from selconv_jax.train._program import bucket_program
from selconv_jax.train._trainer import Trainer

__all__ = ["CompiledProgram", "Messages", "PodPlan", "compile_for_pod", "largest_batch"]

# Assumed latency of one link for the first byte of a message.
HOP_SECONDS = 1e-6


@dataclasses.dataclass(frozen=True)
class Messages:
    """Collectives of one kind in a program.

    Attributes:
        kind: Such as ``"all-reduce"``.
        count: Their number.
        bytes: Total size of their results on one chip.
        largest: Size of the largest one.
    """

    kind: str
    count: int
    bytes: int
    largest: int


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """A program as compiled for a topology.

    Attributes:
        name: ``"training step"`` or ``"evaluation"``.
        memory: Of one chip, see `compilation.memory_of`.
        fits: Whether it fits in the memory of a chip; None: not known.
        messages: Collectives, by kind.
        cycles: Sum of the compiler's estimates for one chip, without the collectives.
        message_seconds: Time of the messages if each has the links to itself, at their published rate, and
            waits for nothing; None: the chip is not known.
        compile_seconds: Time of compilation.
    """

    name: str
    memory: Mapping[str, int] | None
    fits: bool | None
    messages: Sequence[Messages]
    cycles: int
    message_seconds: float | None
    compile_seconds: float


@dataclasses.dataclass(frozen=True)
class PodPlan:
    """A run compiled for a topology.

    Attributes:
        topology: Its name.
        chips: Number of its chips.
        batch_size: Images per training step.
        micro_batches: Gradient accumulation steps. If there are several, the
            cycles and messages within their loop are not counted, or once.
        capacity: Fraction of the channels that the step is compiled for.
        gradient_bytes: Size of the gradient of all parameters.
        memory_capacity: Bytes of a chip's memory; None: the chip is unknown.
        clock: Cycles per second of a chip; None: likewise.
        programs: The training step, then the evaluation if requested.
    """

    topology: str
    chips: int
    batch_size: int
    micro_batches: int
    capacity: float
    gradient_bytes: int
    memory_capacity: int | None
    clock: float | None
    programs: Sequence[CompiledProgram]


def compile_for_pod(
    config: Config,
    topology: str,
    devices: Sequence[Any],
    *,
    capacity: float = 0.25,
    evaluation: bool = True,
    tell: Callable[[str], None] = lambda what: None,
) -> PodPlan:
    """Compile the programs of a run ahead of time for these chips.

    Args:
        config: The run; its ``devices`` is ignored.
        topology: Name of the topology.
        devices: Its chips, from `topology.topology_devices`.
        capacity: Fraction of the channels that the selective layers have room to re-allocate.
        evaluation: Also compile the evaluation.
        tell: Called with a description of the next program.

    Returns:
        Memory, collectives and cycles as the compiler reports them.

    Raises:
        ConfigError: The batch does not divide over the chips, or does not fit in their memory.
    """
    chips = len(devices)
    parts = chips * config.micro_batches
    if config.batch_size % parts:
        raise ConfigError(
            f"batch_size is {config.batch_size}, which does not divide over the {chips} chips of {topology}"
            f"{f' in {config.micro_batches} micro-batches' if config.micro_batches > 1 else ''}. Choose a "
            f"multiple of {parts}, such as batch_size={max(parts, config.batch_size // parts * parts)}."
        )
    per_host = min(collections.Counter(device.process_index for device in devices).values())
    if per_host % config.parameter_shards:
        raise ConfigError(
            f"parameter_shards is {config.parameter_shards}, which does not divide the {per_host} chips of a "
            f"host of {topology}."
        )
    data = abstract_data(*config.data.source)
    trainer = Trainer(config, data, Placement.of(devices, config.parameter_shards))
    program = bucket_program(trainer.model, capacity if config.model.variant == "selective" else 0.0)
    chip = chip_of(topology)
    compiled = []
    lowers = {"training step": trainer.lower_step, "evaluation": trainer.lower_evaluation}
    for name in list(lowers)[: 1 + evaluation]:
        tell(name)
        with tracing_for("tpu"):
            lowered = lowers[name](program)
        try:
            compiled.append(_program(name, compile_lowered(lowered), chip, topology))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise ConfigError(
                f"the {name} does not fit in the memory of the chips of {topology}: "
                f"{str(error).splitlines()[0]} Choose a smaller batch_size, or more micro_batches."
            ) from None
    params = jax.tree.leaves(trainer.state_shape().params)
    return PodPlan(
        topology=topology,
        chips=chips,
        batch_size=config.batch_size,
        micro_batches=config.micro_batches,
        capacity=capacity,
        gradient_bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in params),
        memory_capacity=chip.memory if chip else None,
        clock=chip.clock if chip else None,
        programs=compiled,
    )


def largest_batch(
    config: Config,
    topology: str,
    devices: Sequence[Any],
    *,
    capacity: float = 0.25,
    tell: Callable[[str], None] = lambda what: None,
) -> PodPlan | None:
    """Find the largest batch that fits, by doubling and halving that of the run.

    Args:
        config: The run; the search starts from its batch size.
        topology: Name of the topology.
        devices: Its chips.
        capacity: See `compile_for_pod`.
        tell: Called with a description of the next program.

    Returns:
        The plan, of the training step alone; None: not even one image per chip fits.
    """
    least = len(devices) * config.micro_batches
    most = len(abstract_data(*config.data.source).train)

    def attempt(size: int) -> PodPlan | None:
        tried = dataclasses.replace(config, batch_size=size)
        try:
            plan = compile_for_pod(
                tried,
                topology,
                devices,
                capacity=capacity,
                evaluation=False,
                tell=lambda what: tell(f"{what}, batch of {size}"),
            )
        except ConfigError as error:
            if "does not fit" not in str(error):
                raise
            return None
        return plan if plan.programs[0].fits is not False else None

    size = max(config.batch_size // least, 1) * least
    best = attempt(size)
    while best is not None and 2 * size <= most:
        size *= 2
        larger = attempt(size)
        if larger is None:
            return best
        best = larger
    while best is None and size > least:
        size = max(size // 2 // least, 1) * least
        best = attempt(size)
    return best


def _program(name: str, compiled: Compiled, chip: Chip | None, topology: str) -> CompiledProgram:
    text = compiled.run.as_text()
    found = collectives(text)
    by_kind: dict[str, list[int]] = collections.defaultdict(list)
    for message in found:
        by_kind[message.kind].append(message.bytes)
    memory = compiled.memory
    return CompiledProgram(
        name=name,
        memory=memory,
        fits=memory["total"] <= chip.memory if memory and chip else None,
        messages=[Messages(kind, len(sizes), sum(sizes), max(sizes)) for kind, sizes in by_kind.items()],
        cycles=sum(cost.cycles for cost in entry_costs(text)),
        message_seconds=_seconds([message.bytes for message in found], chip, topology) if chip else None,
        compile_seconds=compiled.compile_seconds,
    )


def _seconds(sizes: Sequence[int], chip: Chip, topology: str) -> float:
    """Estimate the time of sequential all-reduces, which send nearly all bytes, and cross all hops, twice."""
    sides = [int(side) for side in topology.partition(":")[2].split("x")]
    chips = math.prod(sides)
    if chips == 1:
        return 0.0
    hops = sum(side // 2 for side in sides)
    return sum(2 * size * (chips - 1) / chips / chip.link_bytes + 2 * hops * HOP_SECONDS for size in sizes)
