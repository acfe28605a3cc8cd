"""What the training loops of this folder share: a small selective network, and batches of images of clothes.

The images are the Fashion-MNIST sample that comes with the package.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from selconv_jax import AllocationRule, SelectiveConv
from selconv_jax.data import load

# The published threshold of 1e-3 is for hundreds of epochs; a run of seconds needs a larger one.
RULE = AllocationRule(threshold=0.15)


class Network(nn.Module):
    """A convolution, three selective ones, a linear classifier.

    Attributes:
        axis_name: Mapped axis over which batch statistics are computed, see `selconv_jax.SelectiveConv`.
    """

    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Map images ``[N, H, W, C]`` to logits ``[N, 10]``."""
        x = nn.Conv(16, (3, 3), strides=2)(images)
        for features, strides in ((32, 2), (32, 1), (32, 1)):
            x = SelectiveConv(features, (3, 3), strides=strides, axis_name=self.axis_name)(x, train)
        return nn.Dense(10)(nn.relu(x).mean(axis=(1, 2)))


def scaled(pixels: np.ndarray) -> jax.Array:
    """Scale pixels from 0 to 255 to mean 0 and standard deviation 1, about."""
    return jnp.asarray((pixels / 255 - 0.29) / 0.35, jnp.float32)


def batch(step: int, size: int = 64, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """Return the images ``[size, 28, 28, 1]`` and labels ``[size]`` of a step, the same in every run."""
    split = load("fashion_mnist_sample").train
    rows = np.random.default_rng((seed, step)).integers(len(split), size=size)
    return scaled(split.images[rows]), jnp.asarray(split.labels[rows])


def test_set() -> tuple[jax.Array, jax.Array]:
    """Return the 1,000 test images and their labels."""
    split = load("fashion_mnist_sample").test
    return scaled(split.images), jnp.asarray(split.labels)
