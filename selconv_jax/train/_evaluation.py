"""Evaluating the network of a run, and compacting that of a checkpoint: its size, and export to a file."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from selconv_jax._utils.files import check_target
from selconv_jax.analysis._counting import count_multiply_adds, count_parameters
from selconv_jax.compaction import Compact, CompactionPlan, save_compact
from selconv_jax.data._dataset import DatasetInfo
from selconv_jax.train._network import Program
from selconv_jax.train._run_setup import restore_run
from selconv_jax.train._seeds.requests import Request, Requests, answered_alone
from selconv_jax.train._state import TrainState
from selconv_jax.train._trainer import Trainer
from selconv_jax.transforms._layer_tree import layer_states


def evaluation_metrics(
    trainer: Trainer,
    state: TrainState,
    program: Program,
    info: DatasetInfo,
    should_stop: Callable[[], bool] = lambda: False,
) -> Requests[dict[str, float] | None]:
    """Evaluate a state on all validation images, if there are any, and on all test images; see `Request`.

    Returns:
        test_loss, test_accuracy and, with more than five classes, test_top5; before them the same for
        ``validation``, if there are validation images. None if it was asked to stop.
    """
    metrics = {}
    for split in ("validation", "test") if trainer.config.data.has_validation else ("test",):
        order = int(state.step), 0, split != "validation"
        totals = yield Request(order, trainer, state, program, split=split, should_stop=should_stop)
        if totals is None:
            return None
        count = int(totals.count)
        metrics[f"{split}_loss"] = float(totals.loss) / count
        metrics[f"{split}_accuracy"] = int(totals.correct) / count
        if info.num_classes > 5:
            metrics[f"{split}_top5"] = int(totals.correct_top5) / count
    return metrics


def evaluate_run(
    workdir: Path, step: int | None = None, overrides: Sequence[str] = ()
) -> tuple[int, dict[str, float]]:
    """Evaluate a checkpoint on all validation images, if the run has any, and on all test images.

    Args:
        workdir: The directory of the run.
        step: The checkpoint; None: the newest, which must not be damaged.
        overrides: As for `resume_run`.

    Returns:
        The step of the checkpoint, and the losses and accuracies in [0, 1] by name, such as ``test_loss``,
        ``test_accuracy`` and, for more than 5 classes, ``test_top5``.

    Raises:
        SelconvError: A user-fixable error.
    """
    trainer, info, step, state = restore_run(workdir, step, overrides)
    # The program of the epoch that the checkpoint belongs to.
    epoch = max(step - 1, 0) // trainer.steps_per_epoch
    metrics = answered_alone(evaluation_metrics(trainer, state, trainer.program(state, epoch), info))
    assert metrics is not None  # only a request to stop returns None
    return step, metrics


@dataclasses.dataclass(frozen=True)
class CompactedRun:
    """The compacted network of the checkpoint of a step.

    Attributes:
        sizes: Channels that the layers with a gate read, parameters, and multiply-adds (MACs) per image, by
            name: before compaction, providing for the copies (`count_layers`, "selective"), and after.
        metrics: As `evaluate_run` returns them; empty if it was not evaluated.
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
    """Compact the network of a checkpoint, by default of the newest, which must not be damaged.

    Widths are rounded up to a ``multiple``, see `selconv_jax.compact`. If requested, evaluate the network on
    all validation and test images, and write it to a new file ``output``.
    """
    if output is not None:
        check_target(output)
    trainer, info, step, state = restore_run(workdir, step, overrides)
    plan = trainer.plan_compaction(state, multiple)
    variables = plan.take(state.variables)
    if output is not None:
        save_compact(output, plan.model, variables)
    program = Program("compact", plan.frozen_model())
    metrics = answered_alone(evaluation_metrics(trainer, state, program, info)) if evaluate else {}
    assert metrics is not None  # only a request to stop returns None
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
