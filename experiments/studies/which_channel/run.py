"""Run the study: train plain networks, close channels by every criterion, measure, fine-tune.

    python experiments/studies/which_channel/run.py [--workdir DIR] [OPTION of `selconv sweep` ...]

Started again after an interruption, it resumes. ``results.json`` in the directory has every number;
`summary.py` beside this file makes table and picture of them.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from criteria import CRITERIA, close, rankings
from flax import traverse_util

from selconv_jax import layer_states, restart_for_cpu, selectivize
from selconv_jax._cli.main import main as selconv
from selconv_jax._utils.files import write_json
from selconv_jax.analysis import count_multiply_adds, count_parameters
from selconv_jax.compaction import CompactionPlan
from selconv_jax.train import Trainer, TrainState
from selconv_jax.train._run_setup import prepare_again, restore_run
from selconv_jax.train._workdir import CONFIG, read_config

STUDY = Path(__file__).resolve().parent
SEEDS = "0,1,2"
SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
TRAINED_ON = (0.3, 0.5)
EPOCHS_ON, RATE_ON = 2, 0.01
RESULTS = "results.json"

Measure = Callable[[Path, set[tuple[Any, ...]]], Iterator[dict[str, Any]]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Train the missing networks, then measure; return the exit code of the training."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--workdir", type=Path, default=Path("runs/which_channel"))
    options, rest = parser.parse_known_args(arguments)
    files = [str(STUDY / f"{name}.toml") for name in ("densenet", "preresnet")]
    trained = options.workdir / "trained"
    if code := selconv(["sweep", *files, "--seeds", SEEDS, "--workdir", str(trained), *rest]):
        return code
    collect(options.workdir, measured)
    return 0


def collect(workdir: Path, measure: Measure) -> None:
    """Add what is missing of every trained network to the results; after each, they are written whole.

    Args:
        workdir: Of the study.
        measure: From the directory of a run, and the network, seed, criterion and fraction of the existing
            results, to the missing ones.
    """
    path = workdir / RESULTS
    rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    done = {(row["network"], row["seed"], row["criterion"], row["share"]) for row in rows}
    for directory in sorted(file.parent for file in (workdir / "trained").rglob(CONFIG)):
        for row in measure(directory, done):
            rows.append(row)
            print(json.dumps(row), flush=True)
            write_json(path, rows)


def measured(directory: Path, done: set[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """Yield the results of a trained network for every criterion and fraction not done yet.

    Args:
        directory: Of the run of the plain network.
        done: Network, seed, criterion and fraction of the existing rows.
    """
    plain = read_config(directory)
    points = [
        (criterion, share) for criterion in CRITERIA for share in SHARES if share or criterion == CRITERIA[0]
    ]
    points = [point for point in points if (plain.model.name, plain.seed, *point) not in done]
    if not points:
        return
    _, _, _, trained = restore_run(directory)
    # The same network with gates. It makes no rounds.
    config = dataclasses.replace(
        plain,
        model=dataclasses.replace(plain.model, variant="gate_only"),
        optimizer=dataclasses.replace(plain.optimizer, learning_rate=RATE_ON),
        allocation=dataclasses.replace(plain.allocation, top_k=0, compile_frozen=False),
        epochs=EPOCHS_ON,
    )
    trainer, data = prepare_again(config)
    initial = trainer.initial_state()
    open_ = initial.with_variables(
        selectivize({"params": trained.params, "batch_stats": trained.batch_stats}, initial.variables)
    )
    states = layer_states(open_.variables)
    image = jax.ShapeDtypeStruct((1, *data.info.image_shape), trainer.model.dtype)
    for criterion, share in points:
        gates = close(rankings(states, criterion, plain.seed), share)
        state = with_gates(open_, gates)
        row = {
            "network": plain.model.name,
            "seed": plain.seed,
            "criterion": criterion,
            "share": share,
            "closed": sum(int((~gate).sum()) for gate in gates.values()),
            "channels": sum(gate.size for gate in gates.values()),
            **compact_sizes(trainer.plan_compaction(state), state, image),
            **accuracies(trainer, state, ""),
        }
        if share in TRAINED_ON:
            row |= accuracies(trainer, train_on(trainer, state), "_trained_on")
        yield row


def compact_sizes(plan: CompactionPlan, state: TrainState, image: jax.ShapeDtypeStruct) -> dict[str, int]:
    """Count parameters and multiply-adds (MACs) per image of the network without its closed channels."""
    variables = plan.take(state.variables)
    counts = count_multiply_adds(lambda x: plan.model.apply(variables, x, train=False), image)
    return {"parameters": count_parameters(variables["params"]), "multiply_adds": sum(counts.values())}


def with_gates(state: TrainState, gates: dict[str, Any]) -> TrainState:
    """Copy a state with these gates, so that it may be donated to a step."""
    flat = traverse_util.flatten_dict(state.selectivity, sep="/")
    flat = {**flat, **{f"{path}/gate": jnp.asarray(gate) for path, gate in gates.items()}}
    state = dataclasses.replace(state, selectivity=traverse_util.unflatten_dict(flat, sep="/"))
    return jax.tree.map(jnp.copy, state)


def train_on(trainer: Trainer, state: TrainState) -> TrainState:
    """Train a state for the epochs of the trainer's run, without rounds; return the final state."""
    for epoch in range(trainer.config.epochs):
        program = trainer.program(state, epoch)
        with contextlib.closing(trainer.batches(state, epoch)) as batches:
            for _ in range(trainer.steps_per_epoch):
                state, _ = trainer.run_steps(state, batches, program, 1)
    return state


def accuracies(trainer: Trainer, state: TrainState, suffix: str) -> dict[str, float]:
    """Compute the accuracy on the validation and the test images."""
    program = trainer.program(state, 0)
    found = {}
    for split in ("validation", "test"):
        totals = trainer.evaluate(state, program=program, split=split)
        assert totals is not None  # only a request to stop returns None
        found[f"{split}_accuracy{suffix}"] = float(totals.correct) / float(totals.count)
    return found


if __name__ == "__main__":
    restart_for_cpu()
    sys.exit(main())
