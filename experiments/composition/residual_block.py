"""Classify images of clothes with a custom residual block that has a grouped selective convolution.

The pictures are the Fashion-MNIST sample that comes with the package. Run it with

    python experiments/composition/residual_block.py --steps 40
"""

import argparse
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import selconv_jax
from selconv_jax import AllocationRule, SelectiveConv
from selconv_jax.data import load

Variables = Mapping[str, Any]

# The published threshold of 1e-3 is for hundreds of epochs; a run of seconds needs a larger one.
ALLOCATION = AllocationRule(threshold=0.15)


class Block(nn.Module):
    """Squeeze, 3x3 in groups, expand, and a shortcut; batch norm and ReLU are inside the layers."""

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map ``[N, H, W, C]`` to ``[N, H / stride, W / stride, features]``."""
        y = SelectiveConv(self.features // 2, (1, 1))(x, train)
        y = SelectiveConv(self.features // 2, (3, 3), strides=self.stride, feature_group_count=4)(y, train)
        # Gate-only: the last layer closes channels and never copies.
        y = SelectiveConv(self.features, (1, 1), gate_only=True)(y, train)
        if x.shape != y.shape:
            x = nn.Conv(self.features, (1, 1), strides=self.stride, use_bias=False)(x)
        return x + y


class Network(nn.Module):
    """A first convolution, two blocks, a linear classifier."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Map images ``[N, H, W, C]`` to logits ``[N, 10]``."""
        x = nn.Conv(16, (3, 3), strides=2)(images)
        for features, stride in ((32, 1), (64, 2)):
            x = Block(features, stride)(x, train)
        return nn.Dense(10)(nn.relu(x).mean(axis=(1, 2)))


def train(steps: int) -> tuple[nn.Module, Variables, jax.Array, list[float], list[selconv_jax.Report]]:
    """Train the network; return it, its variables, an example input, and the history."""
    split = load("fashion_mnist_sample").train
    model, optimizer = Network(), optax.adam(3e-3)
    rng = np.random.default_rng(0)
    images = (split.images[:64] / 255).astype(np.float32)
    variables = jax.jit(lambda key: model.init(key, images, train=False))(jax.random.key(0))
    opt_state = optimizer.init(variables["params"])

    @jax.jit
    def step_of(
        variables: Variables, opt_state: optax.OptState, images: jax.Array, labels: jax.Array
    ) -> tuple[Variables, optax.OptState, jax.Array]:
        def loss_of(params: Variables) -> tuple[jax.Array, Variables]:
            logits, updates = model.apply(
                {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updates

        (loss, updates), gradients = jax.value_and_grad(loss_of, has_aux=True)(variables["params"])
        changes, opt_state = optimizer.update(gradients, opt_state, variables["params"])
        params = optax.apply_updates(variables["params"], changes)
        return {**variables, **updates, "params": params}, opt_state, loss

    losses, reports = [], []
    every = max(1, steps // 6)
    for step in range(steps):
        batch = rng.integers(len(split), size=64)
        pixels = (split.images[batch] / 255).astype(np.float32)
        variables, opt_state, loss = step_of(variables, opt_state, pixels, split.labels[batch])
        losses.append(float(loss))
        if (step + 1) % every == 0:
            print(f"step {step + 1}: loss {loss:.3f}")
        if (step + 1) % every == 0 and step < steps // 2:
            key = jax.random.fold_in(jax.random.key(1), step)
            variables, report = selconv_jax.reallocate(variables, key, ALLOCATION)
            # Adam's moments of a slot belong to the channel that it read before.
            opt_state = selconv_jax.reset_rewritten(optimizer, opt_state, variables["params"], report)
            print(
                f"  de-allocated {report.deallocated}, re-allocated {report.reallocated} "
                f"of {report.channels} channels"
            )
            reports.append(report)
    return model, variables, jnp.asarray(images), losses, reports


def main() -> None:
    """Read the number of steps, train, and print the accuracy on test images."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    model, variables, *_ = train(parser.parse_args().steps)
    test = load("fashion_mnist_sample").test
    images = (test.images / 255).astype(np.float32)
    logits = jax.jit(lambda images: model.apply(variables, images, train=False))(images)
    print(f"accuracy on test images: {np.mean(np.argmax(logits, axis=-1) == test.labels):.1%}")


if __name__ == "__main__":
    main()
