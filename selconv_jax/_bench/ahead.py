"""Programs compiled ahead of time for chips that this machine does not have.

The compilers are the real ones, of the package libtpu and of JAX's CUDA plugin; nothing is run. What they
report is useful for comparing programs with each other: estimated cycles of a TPU chip; kernels of a GPU, and
the bytes that these read and write. Programs are traced as on the chip, see `_xla.platforms`.
"""

import dataclasses
import importlib.util
import itertools
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from selconv_jax._bench.chips import GPUS, Chip, check_topology, chip_of, platform_of, sides_of
from selconv_jax._bench.compilation import compile_program
from selconv_jax._bench.hlo import CostedOperation, entry_cycles, entry_kernels, message_sizes
from selconv_jax._xla.platforms import tracing_for
from selconv_jax.errors import ConfigError

# Assumed latency of one link for the first byte of a message.
HOP_SECONDS = 1e-6

_TWO_CORES = ("v4:", "v5p:")
_LARGEST = 8  # operations that are reported
# Without these the TPU compiler queries the network for its machine type, and complains.
_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
}
_CUDA_PLUGINS = ("xla_cuda13", "xla_cuda12")


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
    memory: Mapping[str, int] | None  # see `compilation.TimedProgram`
    fits: bool | None  # whether it fits in the memory of a chip; None: not known
    messages: Sequence[Messages]  # collectives, by kind
    cost: int  # TPU: sum of the compiler's cycle estimates, without collectives; GPU: bytes read and written
    kernels: int | None  # launched on a GPU; None: a TPU
    message_seconds: float | None  # see `message_seconds`; None: the rate is not known
    compile_seconds: float
    largest: Sequence[CostedOperation] = ()  # the most costly operations, the most costly first


def prepare_compiler(topology: str) -> None:
    """Keep JAX on the CPU, and set up the compiler for the chips; call before JAX uses a device.

    Raises:
        ConfigError: The name is invalid, or the compiler is not installed.
    """
    check_topology(topology)
    if platform_of(topology) == "tpu":
        if importlib.util.find_spec("libtpu") is None:
            raise ConfigError(
                f"--topology {topology} needs the TPU compiler, which is not installed. Install it by "
                "`pip install libtpu`."
            )
        environment = _TPU_ENVIRONMENT
    else:
        # Without a GPU nothing can be tried out: autotuning is off.
        flags = f"--xla_gpu_autotune_level=0 --xla_gpu_cuda_data_dir={_cuda_directory(topology)}"
        # The user's own come last, and so count.
        os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}"
        environment = {"TF_CPP_MIN_LOG_LEVEL": "1"}
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")


def _cuda_directory(topology: str) -> Path:
    """Find the CUDA toolkit with ``ptxas``: of an installation, or of NVIDIA's packages for Python.

    Raises:
        ConfigError: It or JAX's CUDA plugin is not installed.
    """
    if not any(map(_has_plugin, _CUDA_PLUGINS)):
        version = f"=={jax.__version__}"
        raise ConfigError(
            f"--topology {topology} needs JAX's CUDA plugin, which is not installed. Install it by `pip "
            f"install --no-deps jax-cuda13-plugin{version} jax-cuda13-pjrt{version}`; no GPU is needed."
        )
    nvidia = importlib.util.find_spec("nvidia")
    packages = [Path(place) for place in (nvidia.submodule_search_locations or ())] if nvidia else []
    found = shutil.which("ptxas")
    places = [place / version for place in packages for version in ("cu13", "cuda_nvcc")]
    places += [Path(found).resolve().parents[1]] if found else []
    places += [Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"), reverse=True)]
    for place in places:
        if (place / "bin" / "ptxas").is_file() and (place / "nvvm" / "libdevice").is_dir():
            return place
    raise ConfigError(
        f"--topology {topology} needs ptxas and libdevice of CUDA's toolkit, which were not found. Install "
        "them by `pip install nvidia-cuda-nvcc nvidia-nvvm`."
    )


def _has_plugin(name: str) -> bool:
    try:
        return importlib.util.find_spec(f"jax_plugins.{name}") is not None
    except ModuleNotFoundError:
        return False


def topology_devices(name: str) -> list[Any]:
    """Return the chips of a topology, as devices for ahead-of-time compilation; see `prepare_compiler`.

    Raises:
        ConfigError: There is no such topology, or another process holds the compiler.
    """
    kind = name.partition(":")[0]
    try:
        if kind in GPUS:
            shape = f"1x1x{math.prod(sides_of(name))}"  # on one host
            target = {"target_config": GPUS[kind].description, "topology": shape}
            return list(topologies.get_topology_desc(platform="cuda", **target).devices)
        # A chip with two cores is one device, as on real chips.
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
            f"--topology is {name!r}, which the compiler does not take: {message.splitlines()[0]} Names are "
            f"such as {', '.join(GPUS)}, v5e:1x1, v5e:2x4, v4:2x2x1."
        ) from None


def compile_ahead(name: str, lower: Callable[[], jax.stages.Lowered], topology: str) -> CompiledProgram:
    """Compile what ``lower`` returns for the chips of a topology, on which its arguments are sharded."""
    platform = platform_of(topology)
    with tracing_for(platform):
        program = compile_program(lower)
    text = program.run.as_text()
    chip, memory, sizes = chip_of(topology), program.memory, message_sizes(text)
    operations = entry_kernels(text) if platform == "gpu" else entry_cycles(text)
    return CompiledProgram(
        name=name,
        memory=memory,
        fits=memory["total"] <= chip.memory if memory and chip else None,
        messages=[Messages(kind, len(each), sum(each), max(each)) for kind, each in sizes.items()],
        cost=sum(operation.cost for operation in operations),
        kernels=len(operations) if platform == "gpu" else None,
        message_seconds=message_seconds(list(itertools.chain(*sizes.values())), chip, topology),
        compile_seconds=program.compile_seconds,
        largest=sorted(operations, key=lambda operation: -operation.cost)[:_LARGEST],
    )


def message_seconds(sizes: Sequence[int], chip: Chip | None, topology: str) -> float | None:
    """Estimate the time of messages that have the links to themselves, at their published rate.

    They count as all-reduces one after the other, which send nearly all bytes, and cross all hops, twice.
    None: the rate is not known.
    """
    if chip is None or chip.link_bytes is None:
        return None
    sides = sides_of(topology)
    chips = math.prod(sides)
    if chips == 1:
        return 0.0
    hops = sum(side // 2 for side in sides)
    return sum(2 * size * (chips - 1) / chips / chip.link_bytes + 2 * hops * HOP_SECONDS for size in sizes)
