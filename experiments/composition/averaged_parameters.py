"""Train with an exponential moving average of parameters and batch statistics, and evaluate by it.

A round rewrites kernel rows, batch norm and shift of the slots that it fills. What was averaged there belongs
to another channel, so the average starts again at the new values. Run it with

    python experiments/composition/averaged_parameters.py --steps 200

and with ``--average kept`` to see what becomes of the average if it is left as it is.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import optax
from clothes import RULE, Network, batch, test_set
from flax import traverse_util

import selconv_jax

DECAY = 0.98
EVERY = 20  # steps from one round to the next

model = Network()
optimizer = optax.sgd(0.05, momentum=0.9, nesterov=True)


@jax.jit
def train_step(
    variables: Any, opt_state: Any, average: Any, step: int, images: jax.Array, labels: jax.Array
) -> tuple[Any, Any, Any]:
    """Take one step, and let the average follow: faster in the beginning, when there is little to average."""

    def loss_of(params: Any) -> tuple[jax.Array, Any]:
        logits, changed = model.apply({**variables, "params": params}, images, True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), changed

    (_, changed), grads = jax.value_and_grad(loss_of, has_aux=True)(variables["params"])
    changes, opt_state = optimizer.update(grads, opt_state, variables["params"])
    new = {"params": optax.apply_updates(variables["params"], changes), **changed}
    decay = jnp.minimum(DECAY, (1 + step) / (10 + step))
    return {**variables, **new}, opt_state, optax.incremental_update(new, average, 1 - decay)


def averaged(variables: Any) -> Any:
    """Return the variables that are averaged."""
    return {name: variables[name] for name in ("params", "batch_stats")}


def restarted(average: Any, variables: Any, report: selconv_jax.Report) -> Any:
    """Start the average again, at the new values, where a round rewrote the variables."""
    masks = selconv_jax.rewritten_mask(variables["params"], report)
    # The statistics of a channel are rewritten where its scale is.
    flat = traverse_util.flatten_dict(masks)
    stats = {path: flat[*path[:-1], "scale"] for path in traverse_util.flatten_dict(average["batch_stats"])}
    masks = {"params": masks, "batch_stats": traverse_util.unflatten_dict(stats)}
    return jax.tree.map(jnp.where, masks, averaged(variables), average)


@jax.jit
def accuracy(variables: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the fraction of images that the network classifies correctly."""
    return (model.apply(variables, images, False).argmax(axis=-1) == labels).mean()


def train(steps: int, restart: bool, seed: int = 0) -> tuple[Any, Any, list[dict[str, float]]]:
    """Train; return the variables, the average, and accuracies around every round and at the end."""
    variables = jax.jit(model.init, static_argnums=2)(jax.random.key(seed), batch(0)[0], False)
    average, opt_state = averaged(variables), optimizer.init(variables["params"])
    images, labels = test_set()
    history = []
    for step in range(1, steps + 1):
        data = batch(step, seed=seed)
        variables, opt_state, average = train_step(variables, opt_state, average, step, *data)
        if step % EVERY == 0:
            record = {"step": step, "before": float(accuracy({**variables, **average}, images, labels))}
            if step <= steps // 2:
                key = jax.random.fold_in(jax.random.key(seed), step)
                variables, report = selconv_jax.reallocate(variables, key, RULE)
                if restart:
                    average = restarted(average, variables, report)
                # Evaluated with the gates and sources after the round.
                record["after"] = float(accuracy({**variables, **average}, images, labels))
            record["parameters"] = float(accuracy(variables, images, labels))
            print("  ".join(f"{name} {value:.4g}" for name, value in record.items()))
            history.append(record)
    return variables, average, history


def main() -> None:
    """Read the arguments and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--average", choices=["restarted", "kept"], default="restarted")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    train(options.steps, options.average == "restarted", options.seed)


if __name__ == "__main__":
    main()
