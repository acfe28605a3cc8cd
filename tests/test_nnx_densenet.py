"""A DenseNet that a user builds from the Linen layers, and one from the NNX layers: the same training."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import selconv_jax
from selconv_jax import AllocationRule
from selconv_jax.nnx import SelectiveConv, linen_variables, reallocate

GROWTH, CLASSES, STEPS = 12, 10, 20
CLOSING = {"capacity": 0.0}  # rounds only close channels


def pool(x):
    return x.reshape(x.shape[0], x.shape[1] // 2, 2, x.shape[2] // 2, 2, -1).mean((2, 4))


class LinenDenseNet(nn.Module):
    depth: int

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(16, (3, 3), use_bias=False)(x)
        for block in range(3):
            for _ in range(self.depth):
                y = selconv_jax.SelectiveConv(GROWTH, (3, 3), **CLOSING)(x, train)
                x = jnp.concatenate([x, y], axis=-1)
            if block < 2:
                x = pool(selconv_jax.SelectiveConv(x.shape[-1], (1, 1), **CLOSING)(x, train))
        x = nn.relu(nn.BatchNorm(not train, momentum=0.9)(x))
        return nn.Dense(CLASSES)(x.mean(axis=(1, 2)))


class NNXDenseNet(nnx.Module):
    def __init__(self, depth, rngs):
        self.stem = nnx.Conv(3, 16, (3, 3), use_bias=False, rngs=rngs)
        self.layers = nnx.List()
        width = 16
        for block in range(3):
            for _ in range(depth):
                self.layers.append(SelectiveConv(width, GROWTH, (3, 3), **CLOSING, rngs=rngs))
                width += GROWTH
            if block < 2:
                self.layers.append(SelectiveConv(width, width, (1, 1), **CLOSING, rngs=rngs))
        self.norm = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        self.head = nnx.Linear(width, CLASSES, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for layer in self.layers:
            y = layer(x)
            x = pool(y) if layer.kernel_size == (1, 1) else jnp.concatenate([x, y], axis=-1)
        return self.head(nnx.relu(self.norm(x)).mean(axis=(1, 2)))


def loss_of(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@pytest.mark.parametrize("depth", [1, pytest.param(12, marks=pytest.mark.slow)])
def test_same_losses(depth):
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
    labels = jnp.arange(4)
    model = NNXDenseNet(depth, nnx.Rngs(0))
    linen = LinenDenseNet(depth)
    variables = renamed(linen_variables(model), linen.init(jax.random.key(0), x, False))
    optimizer = optax.sgd(0.1, momentum=0.9)
    nnx_optimizer = nnx.Optimizer(model, optimizer, wrt=nnx.Param)
    rule = AllocationRule(threshold=0.1, top_k=0)

    @jax.jit
    def linen_step(variables, state):
        def loss(params):
            y, changed = linen.apply({**variables, "params": params}, x, True, mutable=["batch_stats"])
            return loss_of(y, labels), changed

        (value, changed), gradient = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        updates, state = optimizer.update(gradient, state)
        params = optax.apply_updates(variables["params"], updates)
        return {**variables, **changed, "params": params}, state, value

    @nnx.jit
    def nnx_step(model, optimizer):
        value, gradient = nnx.value_and_grad(lambda model: loss_of(model(x), labels))(model)
        optimizer.update(model, gradient)
        return value

    losses, state = [], optimizer.init(variables["params"])
    for step in range(STEPS):
        if step == STEPS // 2:
            variables, report = selconv_jax.reallocate(variables, jax.random.key(step), rule)
            assert reallocate(model, jax.random.key(step), rule).deallocated == report.deallocated > 0
        variables, state, value = linen_step(variables, state)
        losses.append((float(value), float(nnx_step(model, nnx_optimizer))))
    losses = np.array(losses)
    assert losses[-1, 0] < losses[0, 0]
    np.testing.assert_allclose(losses[:, 1], losses[:, 0], rtol=1e-5)


def renamed(variables, template):
    """The variables of the NNX network by the names of the Linen one."""
    names = {"stem": "Conv_0", "norm": "BatchNorm_0", "head": "Dense_0"}
    count = len(variables["params"]["layers"])
    new = {}
    for collection, leaves in variables.items():
        parts = {names[name]: leaf for name, leaf in leaves.items() if name in names}
        layers = leaves.get("layers", {})
        new[collection] = parts | {f"SelectiveConv_{n}": layers[str(n)] for n in range(count)}
    assert jax.tree.structure(new) == jax.tree.structure(template)
    return new
