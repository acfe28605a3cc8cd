"""Compacting the network of a run: its size, evaluation, and export to a file."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from selconv_jax._utils.files import check_target
from selconv_jax.analysis._counting import count_multiply_adds, count_parameters
from selconv_jax.compaction import Compact, CompactionPlan, save_compact
from selconv_jax.train._epoch_record import evaluation_metrics
from selconv_jax.train._program import Program
from selconv_jax.train._run_setup import restore_run
from selconv_jax.train._state import TrainState
from selconv_jax.transforms._layer_tree import layer_states

__all__ = ["CompactedRun", "compact_run"]


@dataclasses.dataclass(frozen=True)
class CompactedRun:
    """The compacted network of a checkpoint.

    Attributes:
        step: The step of the checkpoint.
        model: The network.
        variables: Its variables.
        sizes: Channels that the layers with a gate read, parameters, and multiply-adds (MACs) per image, by
            name: before compaction, with room for the copies (`count_layers`, "selective"), and after.
        metrics: As `loop.evaluate_run` returns them; empty if it was not evaluated.
    """

    step: int
    model: Compact
    variables: Any
    sizes: dict[str, tuple[int, int]]
    metrics: dict[str, float]


def compact_run(
    workdir: Path,
    step: int | None = None,
    *,
    multiple: int = 1,
    evaluate: bool = False,
    output: Path | None = None,
    overrides: Sequence[str] = (),
) -> CompactedRun:
    """Compact the network of a checkpoint.

    Args:
        workdir: The directory of the run.
        step: The checkpoint; None: the newest, which must not be damaged.
        multiple: See `selconv_jax.compact`.
        evaluate: Compute its loss and accuracy on all validation and test images.
        output: A new file to write the network to, see `selconv_jax.save_compact`.
        overrides: ``"key=value"``, of keys of the configuration that do not change the result.

    Returns:
        The network with its sizes and metrics.

    Raises:
        SelconvError: A user-fixable error.
    """
    if output is not None:
        check_target(output)
    trainer, info, step, state = restore_run(workdir, step, overrides)
    plan = trainer.plan_compaction(state, multiple)
    variables = plan.take(state.variables)
    if output is not None:
        save_compact(output, plan.model, variables)
    metrics = {}
    if evaluate:
        measured = evaluation_metrics(trainer, state, Program("compact", plan.frozen_model()), info)
        assert measured is not None  # only a request to stop returns None
        metrics = measured
    image = jax.ShapeDtypeStruct((1, *info.image_shape), trainer.model.dtype)
    return CompactedRun(step, plan.model, variables, _sizes(state, plan, variables, image), metrics)


def _sizes(state: TrainState, plan: CompactionPlan, variables: Any, image: Any) -> dict[str, tuple[int, int]]:
    gates = {}
    if state.selectivity:
        gates = {path: layer.gate.size for path, layer in layer_states(state.variables).items()}
    reads = {path: layout.reads for path, layout in plan.model.layouts}
    left = sum(reads.get(path, channels) for path, channels in gates.items())
    # The selective network: its shifts, and the products of its copies, count on both sides.
    whole = _multiply_adds(plan.model.network, state.variables, image)
    return {
        "channels": (sum(gates.values()), left),
        "parameters": (count_parameters(state.params), count_parameters(variables["params"])),
        "multiply-adds": (whole, _multiply_adds(plan.model, variables, image)),
    }


def _multiply_adds(model: Any, variables: Any, image: Any) -> int:
    apply: Callable[..., Any] = model.apply
    return sum(count_multiply_adds(lambda images: apply(variables, images, train=False), image).values())
