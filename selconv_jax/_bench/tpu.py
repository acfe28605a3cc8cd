"""Programs compiled ahead of time for TPU topologies: memory, cycles, collectives.

The compiler is the real one, of the package libtpu; nothing is run. Its cycles are estimates for one chip, of
use to compare programs with each other. The programs are traced as on a TPU, see `_xla.platforms`.
"""

import dataclasses
import importlib.util
import itertools
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import topologies

from selconv_jax._bench.compilation import compile_program
from selconv_jax._bench.hlo import CostedOperation, entry_costs, message_sizes
from selconv_jax._xla.platforms import tracing_for
from selconv_jax.errors import ConfigError

__all__ = [
    "HOP_SECONDS",
    "Chip",
    "CompiledProgram",
    "Messages",
    "check_topology",
    "chip_of",
    "compile_ahead",
    "message_seconds",
    "prepare_process",
    "topology_devices",
]

# Assumed latency of one link for the first byte of a message.
HOP_SECONDS = 1e-6

_MOST_CHIPS = 2**14  # no pod has as many
_TWO_CORES = ("v4:", "v5p:")
_LARGEST = 8  # operations that are reported
_PER_CYCLE = 2 * 128 * 128  # operations of one matrix unit
# Without these the compiler queries the network for its machine type, and complains.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU chip, after the tables in Google Cloud's documentation of its version."""

    memory: int  # bytes
    link_bytes: float  # outgoing bytes per second of all its links to other chips together
    clock: float  # cycles per second, derived from the peak operations per second in bfloat16


_CHIPS = {
    "v4": Chip(32 * 2**30, 2400e9 / 8, 275e12 / (8 * _PER_CYCLE)),
    "v5e": Chip(16 * 2**30, 1600e9 / 8, 197e12 / (4 * _PER_CYCLE)),
    "v5p": Chip(95 * 2**30, 4800e9 / 8, 459e12 / (8 * _PER_CYCLE)),
}


@dataclasses.dataclass(frozen=True)
class Messages:
    """Collectives of one kind, such as ``"all-reduce"``: number, total and largest bytes on one chip."""

    kind: str
    count: int
    bytes: int
    largest: int


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """A program as compiled for a topology; all numbers are those of one chip."""

    name: str  # in reports
    memory: Mapping[str, int] | None  # see `compilation.Program`
    fits: bool | None  # whether it fits in the memory of a chip; None: not known
    messages: Sequence[Messages]  # collectives, by kind
    cycles: int  # sum of the compiler's estimates, without the collectives
    message_seconds: float | None  # see `message_seconds`; None: the chip is not known
    compile_seconds: float
    largest: Sequence[CostedOperation] = ()  # the most costly operations, the most costly first


def check_topology(name: str) -> None:
    """Check the name of a TPU topology; the compiler aborts the process at some invalid sizes."""
    sizes = re.fullmatch(r"\w+:([1-9]\d{0,4}(?:x[1-9]\d{0,4}){1,2})", name)
    if sizes is None or math.prod(map(int, sizes[1].split("x"))) > _MOST_CHIPS:
        raise ConfigError(
            f"--topology is {name!r}; it must be of the form v5e:1x1, v5e:2x4, v4:2x2x1: a kind of TPU, and "
            f"how many chips lie along each axis, at least 1, and at most {_MOST_CHIPS:,} in all."
        )


def chip_of(topology: str) -> Chip | None:
    """Look up the chip of a topology such as ``"v5e:2x4"``; None: unknown."""
    return _CHIPS.get(topology.partition(":")[0])


def prepare_process() -> None:
    """Keep JAX on the CPU and the TPU compiler from probing for TPUs; call before JAX uses a device."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")


def topology_devices(name: str) -> list[Any]:
    """Return the chips of a TPU topology, as devices for ahead-of-time compilation.

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


def compile_ahead(name: str, lower: Callable[[], jax.stages.Lowered], topology: str) -> CompiledProgram:
    """Compile what ``lower`` returns for the chips of a topology, on which its arguments are sharded."""
    with tracing_for("tpu"):
        program = compile_program(lower)
    text = program.run.as_text()
    chip, memory, costs, sizes = chip_of(topology), program.memory, entry_costs(text), message_sizes(text)
    all_sizes = list(itertools.chain.from_iterable(sizes.values()))
    return CompiledProgram(
        name=name,
        memory=memory,
        fits=memory["total"] <= chip.memory if memory and chip else None,
        messages=[Messages(kind, len(each), sum(each), max(each)) for kind, each in sizes.items()],
        cycles=sum(cost.cycles for cost in costs),
        message_seconds=message_seconds(all_sizes, chip, topology) if chip else None,
        compile_seconds=program.compile_seconds,
        largest=sorted(costs, key=lambda cost: -cost.cycles)[:_LARGEST],
    )


def message_seconds(sizes: Sequence[int], chip: Chip, topology: str) -> float:
    """Estimate the time of messages that have the links to themselves, at their published rate.

    They count as all-reduces one after the other, which send nearly all bytes, and cross all hops, twice.
    """
    sides = [int(side) for side in topology.partition(":")[2].split("x")]
    chips = math.prod(sides)
    if chips == 1:
        return 0.0
    hops = sum(side // 2 for side in sides)
    return sum(2 * size * (chips - 1) / chips / chip.link_bytes + 2 * hops * HOP_SECONDS for size in sizes)
