"""CondenseNet with gates instead of learned groups, plain or gate-only."""

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import jax

from selconv_jax._utils.arguments import check_whole
from selconv_jax._xla.batch_norm import Statistics, batch_statistics
from selconv_jax.errors import ConfigError
from selconv_jax.models._network import LayerMaker, Network
from selconv_jax.models._parts import append_features, average_pool


class CondenseNet(Network):
    """Densely connected network whose growth increases from block to block, with grouped 3x3 convolutions.

    Every layer is a 1x1 convolution to ``4 * growth`` channels (gate-only, with dropout) and a plain grouped
    3x3 one to ``growth``, whose output is appended to the layer's input (experiments, "Models"). The variant
    published is ``"gate_only"``; ``"selective"``, which also re-allocates closed channels, is an extension.

    Attributes:
        blocks: Layers per block; the defaults are CondenseNet-182.
        growth: Channels that a layer appends, per block. The stem has twice those of the first block.
        groups: Groups of the 3x3 convolutions.
        dropout_rate: Dropout before the 1x1 convolutions.

    See `Network` for the other attributes.

    Raises:
        ConfigError: A value is out of bounds or not one of the choices.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from selconv_jax.models import CondenseNet
        >>> model = CondenseNet(num_classes=10, blocks=(1, 1), growth=(4, 8))
        >>> variables = model.init(jax.random.key(0), jnp.ones((1, 8, 8, 3)), train=False)
        >>> variables["params"]["block2_layer1"]["conv2"]["kernel"].shape
        (3, 3, 8, 8)
    """

    blocks: Sequence[int] = (30, 30, 30)
    growth: Sequence[int] = (12, 24, 48)
    groups: int = 4
    variant: str = dataclasses.field(default="gate_only", kw_only=True)
    dropout_rate: float = dataclasses.field(default=0.1, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("groups", self.groups, 1)
        self._check_widths("growth", len(self.blocks))
        for growth in self.growth:
            if growth % self.groups:
                raise ConfigError(
                    f"growth is {self.growth!r}; {growth} is not a multiple of groups {self.groups}."
                )

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Map images ``[N, H, W, C]`` to logits ``[N, num_classes]``."""
        x = self._stem(2 * self.growth[0])(images)
        for index, (layers, growth) in enumerate(zip(self.blocks, self.growth, strict=True), start=1):
            if index > 1:
                x = average_pool(x)
            statistics = batch_statistics(x) if train else None
            for layer in range(1, layers + 1):
                x, statistics = _Layer(self._make, growth, self.groups, name=f"block{index}_layer{layer}")(
                    x, train, statistics
                )
        return self._classifier()(x, train, statistics)


class _Layer(nn.Module):
    """Bottleneck layer that appends ``growth`` channels to its input."""

    make: LayerMaker
    growth: int
    groups: int

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool, statistics: Statistics | None
    ) -> tuple[jax.Array, Statistics | None]:
        """Map ``[N, H, W, C]``, and its statistics, to ``[N, H, W, C + growth]``."""
        y = self.make.selective(4 * self.growth, 1, "conv1")(x, train, statistics)
        y = self.make.plain(self.growth, 3, "conv2", feature_group_count=self.groups)(y, train)
        return append_features(x, statistics, y)
