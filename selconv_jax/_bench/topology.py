"""Training steps compiled ahead of time for a TPU topology: estimated cycles and memory.

The compiler is the real one, of the package libtpu; nothing is run. Its cycles are estimates for one chip,
of use to compare programs with each other. The programs are traced as on a TPU, see `_xla.platforms`.
"""

import dataclasses
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.experimental import topologies

from selconv_jax._bench.cases import PLAIN, step_name
from selconv_jax._bench.compilation import Program, compile_program
from selconv_jax._bench.hlo import CostedOperation, entry_costs
from selconv_jax._bench.run import Listener
from selconv_jax._bench.settings import BenchSettings, check_topology
from selconv_jax._bench.states import without_allocation
from selconv_jax._bench.workbench import Workbench
from selconv_jax._xla.platforms import tracing_for
from selconv_jax.errors import ConfigError
from selconv_jax.train._distributed.sharding import Placement

__all__ = ["CompiledStep", "TopologyResult", "bench_topology", "prepare_process", "topology_devices"]

_TWO_CORES = ("v4:", "v5p:")
_LARGEST = 8  # operations that are reported
# Without these the compiler queries the network for its machine type, and complains.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
}


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A training step as compiled for a topology.

    Attributes:
        name: As in timed benchmarks.
        cycles: Sum of the estimates, for one chip.
        ratio: Of the cycles to those of the plain step; None: the compiler gives no estimate.
        memory: Of one chip, see `compilation.memory_of`.
        memory_ratio: Of the total memory to that of the plain step; None: unknown.
        compile_seconds: Time of compilation.
        largest: The most costly operations, the most costly first.
    """

    name: str
    cycles: int
    ratio: float | None
    memory: dict[str, int] | None
    memory_ratio: float | None
    compile_seconds: float
    largest: Sequence[CostedOperation]


@dataclasses.dataclass(frozen=True)
class TopologyResult:
    """The compiled steps of a network.

    Attributes:
        model: Its name.
        chips: Number of chips of the topology, over which a batch is split.
        steps: The compiled steps, the plain one first.
        complete: False if it was stopped early.
    """

    model: str
    chips: int
    steps: Sequence[CompiledStep]
    complete: bool


def prepare_process() -> None:
    """Keep JAX on the CPU and the TPU compiler from probing for TPUs; call before JAX uses a device."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")


def topology_devices(name: str) -> list[Any]:
    """Return the chips of a TPU topology.

    Args:
        name: Such as ``"v5e:1x1"``.

    Returns:
        Devices for ahead-of-time compilation.

    Raises:
        ConfigError: libtpu is not installed or another process holds it, or there is no such topology.
    """
    check_topology(name)
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            "--topology needs the TPU compiler, which is not installed. Install it by `pip install libtpu`."
        )
    try:
        # A chip with two cores is one device, as in real use.
        cores = {"chip_config_name": "megacore"} if name.startswith(_TWO_CORES) else {}
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **cores).devices)
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
        if "lockfile" in message or "already in use" in message:
            raise ConfigError(
                "another process holds the TPU compiler (libtpu), which one process at a time can use. Wait "
                "for it or stop it first."
            ) from None
        raise ConfigError(
            f"--topology is {name!r}, which the TPU compiler does not take: {message.splitlines()[0]} "
            "Names are such as v5e:1x1, v5e:2x4, v4:2x2x1."
        ) from None


def bench_topology(
    model: str,
    settings: BenchSettings,
    devices: Sequence[Any],
    listener: Listener,
    should_stop: Callable[[], bool],
) -> TopologyResult:
    """Compile the steps of a network ahead of time for a topology.

    Args:
        model: Its name.
        settings: The benchmark; of ``what`` only ``step``, ``frozen`` and ``compact`` apply.
        devices: From `topology_devices`.
        listener: Informed of the progress.
        should_stop: Called between compilations.

    Returns:
        Memory and cycles as the compiler reports them.

    Raises:
        ConfigError: The batch does not divide over the chips.
    """
    if settings.batch % len(devices):
        raise ConfigError(
            f"--batch is {settings.batch}, which does not divide over the {len(devices)} chips of "
            f"{settings.topology}. Choose a multiple of {len(devices)}."
        )
    bench = Workbench(model, settings)
    placement = Placement.of(devices)
    steps: list[CompiledStep] = []
    wanted = list(_networks(bench))
    for number, (name, make) in enumerate(wanted):
        if should_stop():
            return TopologyResult(model, len(devices), steps, False)
        listener.preparing(number, len(wanted), name)
        network, variables = make()
        program = _compile(bench, network, variables, placement)
        steps.append(_step(name, program, steps[0] if steps else None))
    return TopologyResult(model, len(devices), steps, True)


def _networks(bench: Workbench) -> Iterator[tuple[str, Callable[[], tuple[Any, Any]]]]:
    """List the steps by name, with functions that return the network and the variables of each."""
    settings = bench.settings
    yield PLAIN, lambda: (bench.plain, without_allocation(bench.initial.variables))
    if "step" in settings.what:
        for capacity in settings.capacity:
            network = bench.selective.clone(capacity=capacity)
            yield (
                step_name(capacity),
                functools.partial(lambda network: (network, bench.initial.variables), network),
            )
    if "frozen" in settings.what:
        yield f"frozen, {settings.share:g} re-allocated", bench.frozen
    if "compact" in settings.what:
        yield f"compact, {settings.share:g} closed", bench.compact


def _compile(bench: Workbench, network: Any, variables: Any, placement: Placement) -> Program:
    def shape_of(sharding: Any) -> Callable[[Any], jax.ShapeDtypeStruct]:
        return lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    state = jax.tree.map(shape_of(placement.replicated), jax.eval_shape(bench.state, variables))
    batch = jax.tree.map(shape_of(placement.split), bench.batch)
    step = bench.step(network, placement)
    with tracing_for("tpu"):
        return compile_program(step, state, *batch, donate_argnums=0, out_shardings=placement.replicated)


def _step(name: str, program: Program, plain: CompiledStep | None) -> CompiledStep:
    costs = entry_costs(program.run.as_text())
    cycles = sum(cost.cycles for cost in costs)
    base_cycles = plain.cycles if plain else cycles
    base = plain.memory if plain else program.memory
    return CompiledStep(
        name=name,
        cycles=cycles,
        ratio=cycles / base_cycles if base_cycles else None,
        memory=program.memory,
        memory_ratio=program.memory["total"] / base["total"] if program.memory and base else None,
        compile_seconds=program.compile_seconds,
        largest=sorted(costs, key=lambda cost: -cost.cycles)[:_LARGEST],
    )
