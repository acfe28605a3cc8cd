"""Programs of a run, compiled ahead of time for a topology; and its steps with and without selection."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from selconv_jax._bench.ahead import CompiledProgram, compile_ahead
from selconv_jax._bench.chips import chip_of
from selconv_jax._bench.settings import BenchSettings
from selconv_jax._bench.workbench import Workbench
from selconv_jax.data._abstract import abstract_data
from selconv_jax.errors import ConfigError
from selconv_jax.train._config import Config
from selconv_jax.train._distributed.sharding import Placement
from selconv_jax.train._network import bucket_program
from selconv_jax.train._trainer import Trainer


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """A run compiled for a topology."""

    topology: str
    chips: int
    batch_size: int  # images per training step
    micro_batches: int  # if several, costs and messages within their loop count once or not at all
    capacity: float  # fraction of the channels that the step is compiled for
    gradient_bytes: int  # of all parameters
    memory_capacity: int | None  # bytes of a chip's memory; None: the chip is unknown
    clock: float | None  # cycles per second of a TPU chip; None: likewise
    programs: Sequence[CompiledProgram]  # the training step, then the evaluation if requested


def compile_run(
    config: Config,
    topology: str,
    devices: Sequence[Any],
    *,
    capacity: float = 0.25,
    evaluation: bool = True,
    tell: Callable[[str], None] = lambda what: None,
) -> RunPlan:
    """Compile the programs of a run ahead of time for these chips, instead of its ``devices``.

    Selective layers have room to re-allocate the fraction ``capacity`` of their channels, or the next larger
    one for which runs compile steps. ``tell`` is called with a description of the next program.

    Raises:
        ConfigError: The batch does not divide over the chips, or does not fit in their memory.
    """
    chips = len(devices)
    _check_batch(config.batch_size, chips, topology, config.micro_batches)
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
    return RunPlan(
        topology=topology,
        chips=chips,
        batch_size=config.batch_size,
        micro_batches=config.micro_batches,
        capacity=program.model.capacity,
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
) -> RunPlan | None:
    """Find the largest batch that fits, by doubling and halving that of the run; see `compile_run`.

    Returns:
        The plan, of the training step alone; None: not even one image per chip fits.
    """
    least = len(devices) * config.micro_batches
    most = len(abstract_data(*config.data.source).train)

    def attempt(size: int) -> RunPlan | None:
        try:
            plan = compile_run(
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


def compile_steps(
    config: Config,
    topology: str,
    devices: Sequence[Any],
    *,
    capacity: float = 0.25,
    tell: Callable[[str], None] = lambda what: None,
) -> list[CompiledProgram]:
    """Compile the training steps of the run's network that `selconv bench` times, the plain one first.

    They are those of the plain network; of the selective one without copies and with the fraction
    ``capacity`` of its channels re-allocated, which is also frozen; and of one with as many channels closed,
    compacted. Loss, augmentation and optimizer are the benchmark's.

    Raises:
        ConfigError: The batch does not divide over the chips.
    """
    _check_batch(config.batch_size, len(devices), topology)
    bench = Workbench(
        config.model.name,
        BenchSettings(
            models=(config.model.name,),
            options=config.model.options,
            batch=config.batch_size,
            image=abstract_data(*config.data.source).info.image_shape,
            dtype=config.model.dtype,
            capacity=tuple(dict.fromkeys((0.0, capacity))),
            share=capacity,
        ),
    )
    placement = Placement.of(devices)

    def lower(network: Any, variables: Any) -> jax.stages.Lowered:
        state = _shapes(jax.eval_shape(bench.state, variables), placement.replicated)
        step = jax.jit(bench.step(network, placement), donate_argnums=0, out_shardings=placement.replicated)
        return step.lower(state, *_shapes(bench.batch, placement.split))

    steps = []
    for network in bench.step_networks(("step", "frozen", "compact")):
        tell(network.name)
        steps.append(compile_ahead(network.name, functools.partial(lower, *network.make()), topology))
    return steps


def _check_batch(batch_size: int, chips: int, topology: str, micro_batches: int = 1) -> None:
    parts = chips * micro_batches
    if batch_size % parts:
        raise ConfigError(
            f"batch_size is {batch_size}, which does not divide over the {chips} chips of {topology}"
            f"{f' in {micro_batches} micro-batches' if micro_batches > 1 else ''}. Choose a multiple of "
            f"{parts}, such as batch_size={max(parts, batch_size // parts * parts)}."
        )


def _shapes(tree: Any, sharding: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)
