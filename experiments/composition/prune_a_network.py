"""Prune a trained network of ordinary Flax layers: make it selective, close channels, fine-tune, compact.

The pictures are the Fashion-MNIST sample that comes with the package. Run it with

    python experiments/composition/prune_a_network.py --steps 200
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
from selconv_jax import AllocationRule
from selconv_jax.analysis import count_parameters
from selconv_jax.data import load

Variables = Mapping[str, Any]


class Network(nn.Module):
    """A network as anyone may have trained it; nothing in it knows of selective layers."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map images ``[N, H, W, C]`` to logits ``[N, 10]``."""
        x = nn.Conv(24, (3, 3), strides=2, use_bias=False)(x)
        for features, strides in ((32, 1), (48, 2), (64, 1)):
            x = nn.relu(nn.BatchNorm(not train, momentum=0.9)(x))
            x = nn.Conv(features, (3, 3), strides=strides, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(not train, momentum=0.9)(x))
        return nn.Dense(10)(x.mean(axis=(1, 2)))


def fit(model: nn.Module, variables: Variables, steps: int, rate: float) -> tuple[Variables, list[float]]:
    """Train a network for some steps; return its variables and the losses."""
    split, optimizer = load("fashion_mnist_sample").train, optax.sgd(rate, momentum=0.9, nesterov=True)
    opt_state, rng, losses = optimizer.init(variables["params"]), np.random.default_rng(0), []

    @jax.jit
    def step(
        variables: Variables, opt_state: optax.OptState, x: jax.Array, y: jax.Array
    ) -> tuple[Variables, optax.OptState, jax.Array]:
        def loss(params: Variables) -> tuple[jax.Array, Variables]:
            logits, changed = model.apply({**variables, "params": params}, x, True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), changed

        (value, changed), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        updates, opt_state = optimizer.update(grads, opt_state)
        return (
            {**variables, **changed, "params": optax.apply_updates(variables["params"], updates)},
            opt_state,
            value,
        )

    for _ in range(steps):
        rows = rng.choice(len(split.images), 64)
        x, y = jnp.asarray(split.images[rows] / 255, jnp.float32), jnp.asarray(split.labels[rows])
        variables, opt_state, value = step(variables, opt_state, x, y)
        losses.append(float(value))
    return variables, losses


def accuracy(model: nn.Module, variables: Variables) -> float:
    """Return the share of test images that a network classifies correctly."""
    split = load("fashion_mnist_sample").test
    logits = jax.jit(lambda x: model.apply(variables, x, False))(jnp.asarray(split.images / 255, jnp.float32))
    return float((logits.argmax(axis=-1) == split.labels).mean())


def main(steps: int) -> tuple[nn.Module, Variables, nn.Module, Variables]:
    """Train, convert, close channels, fine-tune and compact; return the selective and the small network."""
    x = jnp.asarray(load("fashion_mnist_sample").train.images[:64] / 255, jnp.float32)
    plain = Network()
    trained, _ = fit(plain, plain.init(jax.random.key(0), x, False), steps, rate=0.1)
    print(f"trained: {count_parameters(trained['params'])} parameters, {accuracy(plain, trained):.1%}")

    model, variables, *_ = result = selconv_jax.selectivize_model(plain, trained, x, gate_only=True)
    print(result.summary())
    rule = AllocationRule(threshold=0.2)
    variables, report = selconv_jax.reallocate(variables, jax.random.key(1), rule)
    print(f"closed {report.deallocated} of {report.channels} channels: {accuracy(model, variables):.1%}")
    tuned, _ = fit(model, variables, steps // 2, rate=0.02)
    small, small_variables = selconv_jax.compact(model, tuned, x)
    parameters = count_parameters(small_variables["params"])
    print(f"fine-tuned and compact: {parameters} parameters, {accuracy(small, small_variables):.1%}")
    return model, tuned, small, small_variables


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200, help="training steps; half as many to fine-tune")
    main(parser.parse_args().steps)
