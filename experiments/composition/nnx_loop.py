"""Train a network of Flax NNX modules with nnx.Optimizer.

Run it with

    python experiments/composition/nnx_loop.py --steps 60
"""

import argparse

import jax
import optax
from clothes import RULE, batch, test_set
from flax import nnx

import selconv_jax
from selconv_jax.nnx import SelectiveConv, fit_capacity, reallocate, reset_rewritten

EVERY = 10  # steps from one round to the next


class Network(nnx.Module):
    """A convolution, three selective ones, a linear classifier."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem = nnx.Conv(1, 16, (3, 3), strides=2, rngs=rngs)
        self.conv1 = SelectiveConv(16, 32, (3, 3), strides=2, rngs=rngs)
        self.conv2 = SelectiveConv(32, 32, (3, 3), rngs=rngs)
        self.conv3 = SelectiveConv(32, 32, (3, 3), rngs=rngs)
        self.head = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Map images ``[N, H, W, C]`` to logits ``[N, 10]``."""
        x = self.conv3(self.conv2(self.conv1(self.stem(images))))
        return self.head(nnx.relu(x).mean(axis=(1, 2)))


@nnx.jit
def train_step(
    model: Network, optimizer: nnx.Optimizer[Network], images: jax.Array, labels: jax.Array
) -> jax.Array:
    """Take one step, in place; return the loss."""

    def loss_of(model: Network) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    loss, grads = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, grads)
    return loss


def train(steps: int) -> tuple[Network, list[float], list[selconv_jax.Report]]:
    """Train the network; return it and the history."""
    model = Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.05, momentum=0.9, nesterov=True), wrt=nnx.Param)
    model.train()
    fit_capacity(model)  # nothing is copied yet: the step costs what that of a plain network costs
    losses, reports = [], []
    for step in range(1, steps + 1):
        losses.append(float(train_step(model, optimizer, *batch(step))))
        if step % EVERY == 0:
            text = f"step {step}: loss {losses[-1]:.3f}"
            if step <= steps // 2:
                reports.append(reallocate(model, jax.random.fold_in(jax.random.key(1), step), RULE))
                reset_rewritten(optimizer, model, reports[-1])
                fit_capacity(model)
                text += f", re-allocated {reports[-1].reallocated} of {reports[-1].channels} channels"
            print(text)
    return model, losses, reports


def main() -> None:
    """Read the number of steps, train, and print the accuracy on test images."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    model, *_ = train(parser.parse_args().steps)
    model.eval()
    images, labels = test_set()
    print(f"accuracy on test images: {(model(images).argmax(axis=-1) == labels).mean():.1%}")


if __name__ == "__main__":
    main()
