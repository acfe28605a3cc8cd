"""Train on several devices with jax.shard_map: each computes its part of the batch.

It takes all devices there are. To try it on a CPU alone, run it with

    XLA_FLAGS=--xla_force_host_platform_device_count=4 python experiments/composition/data_parallel.py

Under ``jax.jit`` alone, with the batch split over the devices, nothing has to be written for this at all.
``shard_map`` is for steps that are written for one device.
"""

import argparse
import functools
from typing import Any

import jax
import optax
from clothes import RULE, Network, batch, test_set
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import selconv_jax

EVERY = 10  # steps from one round to the next
BATCH, WHOLE = PartitionSpec("batch"), PartitionSpec()

# The statistics of the batch are those of the whole batch, as on one device.
model = Network(axis_name="batch")
optimizer = optax.sgd(0.05, momentum=0.9, nesterov=True)


def step_of_device(
    variables: Any, opt_state: Any, images: jax.Array, labels: jax.Array
) -> tuple[Any, Any, jax.Array]:
    """Take one step with a device's part of the batch; the result is the same on all of them."""

    def loss_of(params: Any) -> tuple[jax.Array, Any]:
        logits, changed = model.apply({**variables, "params": params}, images, True, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jax.lax.pmean(losses.mean(), "batch"), changed

    # The parameters are the same on all devices, so JAX sums their gradients over the devices by itself.
    (loss, changed), grads = jax.value_and_grad(loss_of, has_aux=True)(variables["params"])
    changes, opt_state = optimizer.update(grads, opt_state, variables["params"])
    params = optax.apply_updates(variables["params"], changes)
    return {**variables, **changed, "params": params}, opt_state, loss


def train(steps: int, mesh: Mesh) -> tuple[Any, list[float], list[selconv_jax.Report]]:
    """Train on the devices of a mesh with the axis ``batch``; return the variables and the history."""
    variables = jax.jit(model.init, static_argnums=2)(jax.random.key(0), batch(0)[0], False)
    variables = jax.device_put(variables, NamedSharding(mesh, WHOLE))
    opt_state = optimizer.init(variables["params"])
    train_step = jax.jit(
        jax.shard_map(
            step_of_device, mesh=mesh, in_specs=(WHOLE, WHOLE, BATCH, BATCH), out_specs=(WHOLE, WHOLE, WHOLE)
        )
    )
    losses, reports = [], []
    for step in range(1, steps + 1):
        images, labels = jax.device_put(batch(step), NamedSharding(mesh, BATCH))
        variables, opt_state, loss = train_step(variables, opt_state, images, labels)
        losses.append(float(loss))
        if step % EVERY == 0:
            text = f"step {step}: loss {loss:.3f}"
            if step <= steps // 2:
                # Outside of shard_map: the variables stay on all devices, the same on each.
                key = jax.random.fold_in(jax.random.key(1), step)
                variables, report = selconv_jax.reallocate(variables, key, RULE)
                opt_state = selconv_jax.reset_rewritten(optimizer, opt_state, variables["params"], report)
                text += f", re-allocated {report.reallocated} of {report.channels} channels"
                reports.append(report)
            print(text)
    return variables, losses, reports


def main() -> None:
    """Read the number of steps, train on all devices, and print the accuracy on test images."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    mesh = jax.make_mesh((jax.device_count(),), ("batch",))
    variables, *_ = train(parser.parse_args().steps, mesh)
    images, labels = test_set()
    apply = jax.jit(functools.partial(Network().apply, train=False))
    print(f"accuracy on test images: {(apply(variables, images).argmax(axis=-1) == labels).mean():.1%}")


if __name__ == "__main__":
    main()
