"""Train with Flax's TrainState, gradients accumulated by optax.MultiSteps, and Orbax checkpoints.

Run it with

    python experiments/composition/train_state_loop.py --steps 60 --checkpoints /tmp/clothes

and again with more steps: it goes on from the newest checkpoint, as if it had not been interrupted.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import optax
from clothes import RULE, Network, batch, test_set
from flax.training import train_state
from orbax.checkpoint import v1 as ocp

import selconv_jax

EVERY = 10  # steps from one round to the next, and to the next checkpoint


class TrainState(train_state.TrainState):
    """Flax's training state, with the collections that selective layers have besides the parameters."""

    batch_stats: Any
    selectivity: Any

    @property
    def variables(self) -> dict[str, Any]:
        """All variables of the model."""
        return {"params": self.params, "batch_stats": self.batch_stats, "selectivity": self.selectivity}


def create(accumulate: int) -> TrainState:
    """Create the state before the first step."""
    model = Network()
    variables = jax.jit(model.init, static_argnums=2)(jax.random.key(0), batch(0)[0], False)
    optimizer = optax.MultiSteps(optax.sgd(0.05, momentum=0.9, nesterov=True), accumulate)
    return TrainState.create(apply_fn=model.apply, tx=optimizer.gradient_transformation(), **variables)


@jax.jit
def train_step(state: TrainState, images: jax.Array, labels: jax.Array) -> tuple[TrainState, jax.Array]:
    """Take one step: of the optimizer, or towards the next one if gradients are accumulated."""

    def loss_of(params: Any) -> tuple[jax.Array, Any]:
        logits, changed = state.apply_fn(
            {**state.variables, "params": params}, images, True, mutable=["batch_stats"]
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), changed

    (loss, changed), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, **changed), loss


def reallocate(state: TrainState) -> tuple[TrainState, selconv_jax.Report]:
    """Re-allocate, and reset the optimizer's state of what was rewritten, accumulated gradients included."""
    key = jax.random.fold_in(jax.random.key(1), int(state.step))
    variables, report = selconv_jax.reallocate(state.variables, key, RULE)
    opt_state = selconv_jax.reset_rewritten(state.tx, state.opt_state, variables["params"], report)
    return state.replace(**variables, opt_state=opt_state), report


def train(
    steps: int, last_round: int, accumulate: int = 2, folder: Path | None = None
) -> tuple[TrainState, list[float]]:
    """Train up to a number of steps, from the newest checkpoint if there is one; return state and losses."""
    state, losses = create(accumulate), []
    checkpoints = ocp.training.Checkpointer(folder.absolute()) if folder else None
    if checkpoints and checkpoints.latest is not None:
        state = checkpoints.load(abstract_state=state)
        print(f"going on from step {state.step}")
    while state.step < steps:
        state, loss = train_step(state, *batch(int(state.step)))
        losses.append(float(loss))
        if state.step % EVERY == 0:
            text = f"step {state.step}: loss {loss:.3f}"
            if state.step <= last_round:
                state, report = reallocate(state)
                text += f", re-allocated {report.reallocated} of {report.channels} channels"
            print(text)
            if checkpoints:
                checkpoints.save(int(state.step), state)
    if checkpoints:
        checkpoints.close()
    return state, losses


def main() -> None:
    """Read the arguments, train, and print the accuracy on test images."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--accumulate", type=int, default=2, help="batches whose gradients make one update")
    parser.add_argument("--checkpoints", type=Path, help="folder of the checkpoints")
    options = parser.parse_args()
    state, _ = train(options.steps, 30, options.accumulate, options.checkpoints)
    images, labels = test_set()
    logits = jax.jit(lambda images: state.apply_fn(state.variables, images, False))(images)
    print(f"accuracy on test images: {(logits.argmax(axis=-1) == labels).mean():.1%}")


if __name__ == "__main__":
    main()
