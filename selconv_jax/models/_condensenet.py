"""CondenseNet's layout with gates instead of learned groups, plain or gate-only."""

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
    selective_conv,
)
from selconv_jax.nn._layers import BatchNormReLUConv

__all__ = ["CondenseNet"]


class CondenseNet(Network):
    """Densely connected network that grows faster from block to block, with grouped 3x3 convolutions.

    Every layer is a 1x1 convolution to ``4 * growth`` channels (gated, with dropout) and a plain 3x3 one in
    groups to ``growth``, whose result is appended to the layer's input (experiments, "Models"). The published
    variant is ``"gate_only"``; ``"selective"``, which gives closed channels away too, goes beyond it.

    Attributes:
        num_classes: Number of outputs.
        blocks: Layers per block; the defaults are CondenseNet-182.
        growth: Channels that a layer appends, per block. The stem has twice the first.
        groups: Groups of the 3x3 convolutions.
        stem: First convolution, see `parts.STEMS`.
        variant: ``"plain"``, ``"gate_only"`` or ``"selective"``.
        capacity: See `selconv_jax.SelectiveConv`.
        dropout_rate: Dropout before the 1x1 convolutions.
        dtype: Type of the computation; None: that of the input.
        param_dtype: Type of the parameters.

    Raises:
        ConfigError: A value is out of bounds or not one of the choices.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> model = CondenseNet(num_classes=10, blocks=(1, 1), growth=(4, 8))
        >>> variables = model.init(jax.random.key(0), jnp.ones((1, 8, 8, 3)), train=False)
        >>> variables["params"]["block2_layer1"]["conv2"]["kernel"].shape
        (3, 3, 8, 8)
    """

    num_classes: int
    blocks: Sequence[int] = (30, 30, 30)
    growth: Sequence[int] = (12, 24, 48)
    groups: int = 4
    stem: str = "cifar"
    variant: str = "gate_only"
    capacity: float = 1.0
    dropout_rate: float = 0.1
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        check_network(self)
        check_whole("groups", self.groups)
        if not isinstance(self.growth, tuple | list) or len(self.growth) != len(self.blocks):
            raise ConfigError(
                f"growth is {self.growth!r}; it must be a list of {len(self.blocks)}, like blocks."
            )
        for growth in self.growth:
            check_whole("growth", growth)
            if growth % self.groups:
                raise ConfigError(
                    f"growth is {self.growth!r}; {growth} is no multiple of groups {self.groups}."
                )
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Map images ``[N, H, W, C]`` to logits ``[N, num_classes]``."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = Stem(2 * self.growth[0], self.stem, **types, name="stem")(images)
        for index, (layers, growth) in enumerate(zip(self.blocks, self.growth, strict=True), start=1):
            if index > 1:
                x = average_pool(x)
            statistics = batch_statistics(x) if train else None
            for layer in range(1, layers + 1):
                x, statistics = _Layer(
                    growth,
                    self.groups,
                    self.variant,
                    self.capacity,
                    self.dropout_rate,
                    **types,
                    name=f"block{index}_layer{layer}",
                )(x, train, statistics)
        return Classifier(self.num_classes, **types, name="classifier")(x, train, statistics)


class _Layer(nn.Module):
    """Bottleneck layer that appends ``growth`` channels to its input."""

    growth: int
    groups: int
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
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        y = selective_conv(
            self.variant,
            self.capacity,
            features=4 * self.growth,
            kernel_size=(1, 1),
            dropout_rate=self.dropout_rate,
            **types,
            name="conv1",
        )(x, train, statistics)
        y = BatchNormReLUConv(
            self.growth, kernel_size=(3, 3), feature_group_count=self.groups, **types, name="conv2"
        )(y, train)
        return append_features(x, statistics, y)
