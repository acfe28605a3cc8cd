"""Parts shared by the networks: stem, pooling, classifier."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype

from selconv_jax._xla.batch_norm import Statistics, batch_statistics, join_statistics, statistics_dtype
from selconv_jax._xla.convolution import convolve
from selconv_jax._xla.materialize import materialize
from selconv_jax._xla.platforms import target_platform
from selconv_jax.errors import ConfigError
from selconv_jax.nn._computation import fan_out_normal
from selconv_jax.nn._layers import BatchNormReLU

# Kernel size and stride of the first convolution, and whether a 3x3 max pool of stride 2 follows.
STEMS = {
    "cifar": (3, 1, False),
    "tiny_imagenet": (3, 2, False),
    "imagenet": (7, 2, True),
}


class Stem(nn.Module):
    """The first convolution of a network, on the raw image (experiments, "Stem").

    Attributes:
        features: Number of output channels.
        kind: ``"cifar"`` (3x3, stride 1; also for Fashion-MNIST), ``"tiny_imagenet"`` (3x3, stride 2) or
            ``"imagenet"`` (7x7, stride 2, then a 3x3 max pool of stride 2).
        kernel_size: Size of the kernel, odd; None: that of ``kind``.
        norm: Batch norm and ReLU follow the convolution, before the pool: an extension, see `DenseNet`.
        dtype: Type of the computation.
        param_dtype: Type of the parameters.
    """

    features: int
    kind: str = "cifar"
    kernel_size: int | None = None
    norm: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool | None = None) -> jax.Array:
        """Map images ``[N, H, W, C]`` to ``[N, H', W', features]``; only ``norm`` needs ``train``."""
        size, stride, pool = STEMS[self.kind]
        size = self.kernel_size or size
        # Padding is symmetric: "SAME" would pad strided windows on one side only.
        shape = (size, size, images.shape[-1], self.features)
        kernel = self.param("kernel", fan_out_normal, shape, self.param_dtype)
        images, kernel = promote_dtype(images, kernel, dtype=self.dtype)
        x = convolve(
            images,
            kernel,
            strides=(stride, stride),
            padding=((size // 2, size // 2),) * 2,
            kernel_dilation=(1, 1),
        )
        if self.norm:
            x = BatchNormReLU(param_dtype=self.param_dtype, name="norm")(x, train)
        return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1))) if pool else x


class Classifier(nn.Module):
    """The end of a network: batch norm, ReLU, global average pool, linear layer.

    Attributes:
        num_classes: Number of outputs.
        zero_bias: Start the linear bias at 0 (DenseNets) instead of uniformly in ``+-1/sqrt(fan_in)``.
        dtype: Type of the computation; logits are float32 or wider.
        param_dtype: Type of the parameters.
    """

    num_classes: int
    zero_bias: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, statistics: Statistics | None = None) -> jax.Array:
        """Map features ``[N, H, W, C]`` (and their statistics if known) to logits ``[N, num_classes]``."""
        x = BatchNormReLU(param_dtype=self.param_dtype, name="norm")(x, train, statistics)
        x = jnp.mean(x, axis=(1, 2))
        uniform = _uniform(1 / math.sqrt(x.shape[-1]))
        logits = nn.Dense(
            self.num_classes,
            kernel_init=uniform,
            bias_init=nn.initializers.zeros if self.zero_bias else uniform,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="linear",
        )(x)
        return logits if logits.dtype == jnp.float64 else logits.astype(jnp.float32)


def average_pool(x: jax.Array) -> jax.Array:
    """Average ``[N, H, W, C]`` over 2x2 windows; an odd last row or column is dropped.

    Raises:
        ConfigError: There are fewer than 2 rows or columns.
    """
    batch, height, width, channels = x.shape
    if min(height, width) < 2:
        raise ConfigError(
            f"the images are too small for the network: nothing is left of {height}x{width} pixels after the "
            "next 2x2 pool. Take larger images, fewer blocks, or a stem without stride."
        )
    rows, columns = height // 2, width // 2
    x = x[:, : 2 * rows, : 2 * columns]
    if target_platform() == "tpu":
        # There the gradient of the reshaped mean is a broadcast, which is three times as slow.
        wide = x.astype(statistics_dtype(x.dtype))
        window = (1, 2, 2, 1)
        total = jax.lax.reduce_window(wide, np.zeros((), wide.dtype), jax.lax.add, window, window, "VALID")
        return (total / 4).astype(x.dtype)
    return jnp.mean(x.reshape(batch, rows, 2, columns, 2, channels), axis=(2, 4))


def append_features(
    x: jax.Array, statistics: Statistics | None, y: jax.Array
) -> tuple[jax.Array, Statistics | None]:
    """Append new features ``[N, H, W, k]`` to ``[N, H, W, C]``, and their statistics if these are known.

    All later layers of a dense block read the features, so their statistics are computed once, here.

    Args:
        x: The features so far.
        statistics: Statistics of ``x``; None: not needed.
        y: The new features.

    Returns:
        All features, ``[N, H, W, C + k]``, and their statistics.
    """
    if statistics is not None:
        statistics = join_statistics(statistics, batch_statistics(y))
    return append_channels(x, y), statistics


def append_channels(x: jax.Array, y: jax.Array) -> jax.Array:
    """Concatenate ``[N, H, W, C]`` and ``[N, H, W, k]`` to ``[N, H, W, C + k]``, computed once."""
    # As matrices: the CPU compiler concatenates arrays of more axes in a single thread.
    rows = [part.reshape(math.prod(part.shape[:-1]), part.shape[-1]) for part in (x, y)]
    joined = jnp.concatenate(rows, axis=-1)
    return materialize(joined.reshape(*x.shape[:-1], joined.shape[-1]))


def _uniform(limit: float) -> Any:
    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return init
