"""DenseNet with bottlenecks, plain or selective."""

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import jax

from selconv_jax._utils.arguments import check_number, check_whole
from selconv_jax._xla.batch_norm import Statistics, batch_statistics
from selconv_jax.models._network import LayerMaker, Network
from selconv_jax.models._parts import append_features, average_pool


class DenseNet(Network):
    """DenseNet (bottleneck 4, compression 1) or DenseNet-BC (compression below 1).

    Every layer of a block is a 1x1 convolution to ``4 * growth`` channels (selective) and a 3x3 one to
    ``growth`` (gate-only), whose output is appended to the layer's input (experiments, "Models").

    Attributes:
        blocks: Layers per block.
        growth: Channels that a layer appends.
        compression: Fraction of the channels that a transition between blocks keeps; 1: no transitions.
        dropout_rate: Dropout before every convolution of the blocks.
        stem_norm: Batch norm and ReLU follow the stem's convolution, before its pool, as in torchvision's and
            timm's DenseNets: an extension, for `selconv_jax.interop.torch`; the method's networks have none.

    See `Network` for the other attributes.

    Raises:
        ConfigError: A value is out of bounds or not one of the choices.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from selconv_jax.models import DenseNet
        >>> model = DenseNet(num_classes=10, blocks=(1, 1, 1), growth=4)
        >>> variables = model.init(jax.random.key(0), jnp.ones((1, 32, 32, 3)), train=False)
        >>> model.apply(variables, jnp.ones((2, 32, 32, 3)), train=False).shape
        (2, 10)
    """

    blocks: Sequence[int] = (6, 6, 6)
    growth: int = 12
    compression: float = 1.0
    dropout_rate: float = dataclasses.field(default=0.0, kw_only=True)
    stem_norm: bool = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        check_whole("growth", self.growth, 1)
        check_number("compression", self.compression, lambda share: 0 < share <= 1, "a number in (0, 1]")
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Map images ``[N, H, W, C]`` to logits ``[N, num_classes]``."""
        # Counted here, as the arrays of a compacted network have fewer channels.
        channels = 2 * self.growth
        x = self._stem(channels, norm=self.stem_norm)(images, train)
        for index, layers in enumerate(self.blocks, start=1):
            statistics = batch_statistics(x) if train else None
            for layer in range(1, layers + 1):
                x, statistics = _DenseLayer(self._make, self.growth, name=f"block{index}_layer{layer}")(
                    x, train, statistics
                )
            if index == len(self.blocks):
                break
            channels += layers * self.growth
            if self.compression < 1:
                channels = int(channels * self.compression)
                x = self._make.selective(channels, 1, f"transition{index}")(x, train, statistics)
            x = average_pool(x)
        return self._classifier(zero_bias=True)(x, train, statistics)


class _DenseLayer(nn.Module):
    """Bottleneck layer that appends ``growth`` channels to its input."""

    make: LayerMaker
    growth: int

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool, statistics: Statistics | None
    ) -> tuple[jax.Array, Statistics | None]:
        """Map ``[N, H, W, C]``, and its statistics, to ``[N, H, W, C + growth]``."""
        y = self.make.selective(4 * self.growth, 1, "conv1")(x, train, statistics)
        y = self.make.gated(self.growth, 3, "conv2")(y, train)
        return append_features(x, statistics, y)
