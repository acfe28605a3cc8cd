"""Training step and evaluation of a run, compiled ahead of time for a TPU pod."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from selconv_jax._bench.tpu import CompiledProgram, chip_of, compile_ahead
from selconv_jax.data._abstract import abstract_data
from selconv_jax.errors import ConfigError
from selconv_jax.train._config import Config
from selconv_jax.train._distributed.sharding import Placement
from selconv_jax.train._network import bucket_program
from selconv_jax.train._trainer import Trainer

__all__ = ["PodPlan", "compile_for_pod", "largest_batch"]


@dataclasses.dataclass(frozen=True)
class PodPlan:
    """A run compiled for a topology."""

    topology: str
    chips: int
    batch_size: int  # images per training step
    micro_batches: int  # if several, the cycles and messages within their loop are not counted, or once
    capacity: float  # fraction of the channels that the step is compiled for
    gradient_bytes: int  # of all parameters
    memory_capacity: int | None  # bytes of a chip's memory; None: the chip is unknown
    clock: float | None  # cycles per second of a chip; None: likewise
    programs: Sequence[CompiledProgram]  # the training step, then the evaluation if requested


def compile_for_pod(
    config: Config,
    topology: str,
    devices: Sequence[Any],
    *,
    capacity: float = 0.25,
    evaluation: bool = True,
    tell: Callable[[str], None] = lambda what: None,
) -> PodPlan:
    """Compile the programs of a run ahead of time for these chips, instead of its ``devices``.

    Selective layers have room to re-allocate the fraction ``capacity`` of their channels. ``tell`` is called
    with a description of the next program.

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
    trainer = Trainer(
        config, abstract_data(*config.data.source), Placement.of(devices, config.parameter_shards)
    )
    program = bucket_program(trainer.model, capacity if config.model.variant == "selective" else 0.0)
    lowers = {"training step": trainer.lower_step, "evaluation": trainer.lower_evaluation}
    compiled = []
    for name in list(lowers)[: 1 + evaluation]:
        tell(name)
        try:
            compiled.append(compile_ahead(name, functools.partial(lowers[name], program), topology))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise ConfigError(
                f"the {name} does not fit in the memory of the chips of {topology}: "
                f"{str(error).splitlines()[0]} Choose a smaller batch_size, or more micro_batches."
            ) from None
    params = jax.tree.leaves(trainer.state_shape().params)
    chip = chip_of(topology)
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
    """Find the largest batch that fits, by doubling and halving that of the run; see `compile_for_pod`.

    Returns:
        The plan, of the training step alone; None: not even one image per chip fits.
    """
    least = len(devices) * config.micro_batches
    most = len(abstract_data(*config.data.source).train)

    def attempt(size: int) -> PodPlan | None:
        try:
            plan = compile_for_pod(
                dataclasses.replace(config, batch_size=size),
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
    if best is not None:
        while 2 * size <= most and (larger := attempt(2 * size)) is not None:
            best, size = larger, 2 * size
    while best is None and size > least:
        size = max(size // 2 // least, 1) * least
        best = attempt(size)
    return best
