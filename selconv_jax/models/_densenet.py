"""DenseNet with bottlenecks, plain or selective."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from selconv_jax._xla.batch_norm import Statistics, batch_statistics
from selconv_jax.errors import ConfigError
from selconv_jax.models._network import Network
from selconv_jax.models._parts import (
    Classifier,
    Stem,
    append_features,
    average_pool,
    check_network,
    check_whole,
    gated_conv,
    is_real,
    selective_conv,
)

__all__ = ["DenseNet"]


class DenseNet(Network):
    """DenseNet (bottleneck 4, compression 1) or DenseNet-BC (compression below 1).

    Every layer of a block is a 1x1 convolution to ``4 * growth`` channels (selective) and a 3x3 one to
    ``growth`` (gate-only), whose result is appended to the layer's input (experiments, "Models").

    Attributes:
        num_classes: Number of outputs.
        blocks: Layers per block.
        growth: Channels that a layer appends.
        compression: Share of the channels that a transition between blocks keeps; 1 has no transition.
        stem: First convolution, see `parts.STEMS`.
        variant: ``"plain"``, ``"selective"``, or ``"gate_only"`` (de-allocation without re-allocation).
        capacity: See `selconv_jax.SelectiveConv`.
        dropout_rate: Dropout before every convolution of the blocks.
        dtype: Type of the computation; None: that of the input.
        param_dtype: Type of the parameters.

    Raises:
        ConfigError: A value is out of bounds or not one of the choices.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> model = DenseNet(num_classes=10, blocks=(1, 1, 1), growth=4)
        >>> variables = model.init(jax.random.key(0), jnp.ones((1, 32, 32, 3)), train=False)
        >>> model.apply(variables, jnp.ones((2, 32, 32, 3)), train=False).shape
        (2, 10)
    """

    num_classes: int
    blocks: Sequence[int] = (6, 6, 6)
    growth: int = 12
    compression: float = 1.0
    stem: str = "cifar"
    variant: str = "selective"
    capacity: float = 1.0
    dropout_rate: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        check_network(self)
        check_whole("growth", self.growth)
        if not is_real(self.compression) or not 0.0 < self.compression <= 1.0:
            raise ConfigError(f"compression is {self.compression!r}; it must be a number in (0, 1].")
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Map images ``[N, H, W, C]`` to logits ``[N, num_classes]``."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        # Not taken from the arrays: those of a compacted network have fewer.
        channels = 2 * self.growth
        x = Stem(channels, self.stem, **types, name="stem")(images)
        for index, layers in enumerate(self.blocks, start=1):
            statistics = batch_statistics(x) if train else None
            for layer in range(1, layers + 1):
                x, statistics = DenseLayer(
                    self.growth,
                    self.variant,
                    self.capacity,
                    self.dropout_rate,
                    **types,
                    name=f"block{index}_layer{layer}",
                )(x, train, statistics)
            if index == len(self.blocks):
                break
            channels += layers * self.growth
            if self.compression < 1:
                channels = int(channels * self.compression)
                x = selective_conv(
                    self.variant,
                    self.capacity,
                    features=channels,
                    kernel_size=(1, 1),
                    dropout_rate=self.dropout_rate,
                    **types,
                    name=f"transition{index}",
                )(x, train, statistics)
            x = average_pool(x)
        return Classifier(self.num_classes, zero_bias=True, **types, name="classifier")(x, train, statistics)


class DenseLayer(nn.Module):
    """Bottleneck layer that appends ``growth`` channels to its input."""

    growth: int
    variant: str
    capacity: float
    dropout_rate: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool, statistics: Statistics | None
    ) -> tuple[jax.Array, Statistics | None]:
        """Map ``[N, H, W, C]`` to ``[N, H, W, C + growth]``, and the statistics of one to those of both."""
        common = {
            "dropout_rate": self.dropout_rate,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
        }
        y = selective_conv(
            self.variant,
            self.capacity,
            features=4 * self.growth,
            kernel_size=(1, 1),
            **common,
            name="conv1",
        )(x, train, statistics)
        y = gated_conv(self.variant, features=self.growth, kernel_size=(3, 3), **common, name="conv2")(
            y, train
        )
        return append_features(x, statistics, y)
