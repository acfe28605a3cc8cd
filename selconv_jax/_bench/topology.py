"""Training steps of a network, compiled ahead of time for a TPU topology."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from selconv_jax._bench.progress import BenchProgress
from selconv_jax._bench.settings import BenchSettings
from selconv_jax._bench.tpu import CompiledProgram, compile_ahead
from selconv_jax._bench.workbench import Workbench
from selconv_jax.errors import ConfigError
from selconv_jax.train._distributed.sharding import Placement

__all__ = ["TopologyResult", "bench_topology"]


@dataclasses.dataclass(frozen=True)
class TopologyResult:
    """The compiled steps of a network."""

    model: str
    chips: int  # of the topology, over which a batch is split
    steps: Sequence[CompiledProgram]  # the plain one first
    complete: bool  # false if it was stopped early


def bench_topology(
    model: str,
    settings: BenchSettings,
    devices: Sequence[Any],
    progress: BenchProgress,
    should_stop: Callable[[], bool],
) -> TopologyResult:
    """Compile the steps of a network ahead of time for the devices of ``settings.topology``.

    Of ``settings.what`` only ``step``, ``frozen`` and ``compact`` apply.

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
    steps: list[CompiledProgram] = []

    def lower(network: Any, variables: Any) -> jax.stages.Lowered:
        state = _shapes(jax.eval_shape(bench.state, variables), placement.replicated)
        step = jax.jit(bench.step(network, placement), donate_argnums=0, out_shardings=placement.replicated)
        return step.lower(state, *_shapes(bench.batch, placement.split))

    wanted = bench.step_networks(settings.what)
    for number, network in enumerate(wanted):
        if should_stop():
            return TopologyResult(model, len(devices), steps, False)
        progress.preparing(number, len(wanted), network.name)
        lower_it = functools.partial(lower, *network.make())
        steps.append(compile_ahead(network.name, lower_it, str(settings.topology)))
    return TopologyResult(model, len(devices), steps, True)


def _shapes(tree: Any, sharding: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)
