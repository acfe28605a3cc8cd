"""Chips that programs can be compiled for without having one, and names of their topologies."""

import dataclasses
import math
import re

from selconv_jax.errors import ConfigError, nearest

_MOST_CHIPS = 2**14  # no pod has as many
_PER_CYCLE = 2 * 128 * 128  # operations of one matrix unit of a TPU


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip, after its maker's tables.

    Attributes:
        memory: Bytes.
        link_bytes: Outgoing bytes per second of all links to other chips together; None: unknown.
        clock: Cycles per second of a TPU, derived from its peak operations per second in bfloat16.
        description: What the compiler asks of a GPU, a ``GpuTargetConfigProto``; empty: a TPU.
    """

    memory: int
    link_bytes: float | None = None
    clock: float | None = None
    description: str = ""


def _gpu(
    name: str,
    capability: int,
    *,
    cores: int,
    lanes: int,
    gigabytes: int,
    rate: float,
    cache: int,
    shared: int,
) -> Chip:
    """Describe an NVIDIA GPU.

    Args:
        name: As the driver gives it.
        capability: Major number of the compute capability.
        cores: Streaming multiprocessors.
        lanes: Their float32 units, each.
        gigabytes: Memory, in 10^9 bytes.
        rate: Bytes per second of the memory.
        cache: MiB of the L2 cache.
        shared: KiB of shared memory of a multiprocessor; a block may use all but one.
    """
    memory = gigabytes * 10**9
    clock = {8: 1.41, 9: 1.98}[capability]  # GHz
    return Chip(
        memory,
        description=f"""
        gpu_device_info {{
          cuda_compute_capability {{ major: {capability} }}
          core_count: {cores} fpus_per_core: {lanes} clock_rate_ghz: {clock}
          memory_bandwidth: {int(rate)} device_memory_size: {memory} l2_cache_size: {cache * 2**20}
          shared_memory_per_core: {shared * 1024} shared_memory_per_block_optin: {(shared - 1) * 1024}
          shared_memory_per_block: 49152 registers_per_core_limit: 65536 registers_per_block_limit: 65536
          threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        }}
        platform_name: "CUDA" runtime_version {{ major: 13 }} dnn_version_info {{ major: 9 minor: 12 }}
        device_description_str: "{name}"
        """,
    )


TPUS = {
    "v4": Chip(32 * 2**30, 2400e9 / 8, 275e12 / (8 * _PER_CYCLE)),
    "v5e": Chip(16 * 2**30, 1600e9 / 8, 197e12 / (4 * _PER_CYCLE)),
    "v5p": Chip(95 * 2**30, 4800e9 / 8, 459e12 / (8 * _PER_CYCLE)),
}
GPUS = {
    "a100": _gpu(
        "NVIDIA A100-SXM4-80GB", 8, cores=108, lanes=64, gigabytes=80, rate=2039e9, cache=40, shared=164
    ),
    "h100": _gpu(
        "NVIDIA H100 80GB HBM3", 9, cores=132, lanes=128, gigabytes=80, rate=3352e9, cache=50, shared=228
    ),
    "h200": _gpu("NVIDIA H200", 9, cores=132, lanes=128, gigabytes=141, rate=4800e9, cache=50, shared=228),
}


def platform_of(topology: str) -> str:
    """Return ``"gpu"`` or ``"tpu"``, the platform of a topology's chips."""
    return "gpu" if topology.partition(":")[0] in GPUS else "tpu"


def sides_of(topology: str) -> list[int]:
    """Return how many chips lie along each axis: ``[2, 4]`` for ``"v5e:2x4"``, ``[1]`` for ``"h100"``."""
    return [int(side) for side in topology.partition(":")[2].split("x") if side] or [1]


def chip_of(topology: str) -> Chip | None:
    """Look up the chip of a topology such as ``"v5e:2x4"`` or ``"h100"``; None: unknown."""
    return (TPUS | GPUS).get(topology.partition(":")[0])


def check_topology(name: str) -> None:
    """Raise a `ConfigError` unless a topology has a valid name; compilers abort at some invalid sizes."""
    kind, colon, sizes = name.partition(":")
    side = r"[1-9]\d{0,4}"
    is_gpu = kind in GPUS and (not colon or re.fullmatch(side, sizes) is not None)
    is_tpu = kind not in GPUS and re.fullmatch(rf"\w+:{side}(?:x{side}){{1,2}}", name) is not None
    if not (is_gpu or is_tpu) or math.prod(sides_of(name)) > _MOST_CHIPS:
        hint = "" if kind in TPUS | GPUS else f" {nearest(kind, [*GPUS, *TPUS])}"
        raise ConfigError(
            f"--topology is {name!r}.{hint} It must be a GPU ({', '.join(GPUS)}), a number of them on one "
            f"host (h100:8), or a kind of TPU ({', '.join(TPUS)}, ...) with how many chips lie along each "
            f"axis (v5e:1x1, v5e:2x4, v4:2x2x1), at most {_MOST_CHIPS:,} in all."
        )
