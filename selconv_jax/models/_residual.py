"""Residual blocks of bottlenecks, shared by PreResNet and ResNeXt."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from selconv_jax._xla.materialize import materialize
from selconv_jax.models._network import LayerMaker
from selconv_jax.models._parts import average_pool

__all__ = ["Bottleneck", "residual_blocks"]


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution with a shortcut around them (experiments, "Models").

    The 1x1 convolutions are selective. The 3x3 one is gate-only, or plain if it has groups. The shortcut is
    the identity, padded with channels of zeros.

    Attributes:
        make: Makes the layers.
        width: Channels of the 3x3 convolution.
        features: Channels of the sum, at least those of the input.
        groups: Groups of the 3x3 convolution.
    """

    make: LayerMaker
    width: int
    features: int
    groups: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map ``[N, H, W, C]`` to ``[N, H, W, features]``."""
        y = self.make.selective(self.width, 1, "conv1")(x, train)
        if self.groups == 1:
            y = self.make.gated(self.width, 3, "conv2")(y, train)
        else:
            y = self.make.plain(self.width, 3, "conv2", feature_group_count=self.groups)(y, train)
        y = self.make.selective(self.features, 1, "conv3")(y, train)
        grown = y.shape[-1] - x.shape[-1]  # fewer in a compacted network
        y = y + jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, grown))).astype(y.dtype)
        return materialize(y)


def residual_blocks(
    x: jax.Array,
    train: bool,
    make: LayerMaker,
    blocks: Sequence[int],
    widths: Sequence[int],
    features: Sequence[int],
    groups: int = 1,
) -> jax.Array:
    """Apply blocks of bottlenecks with 2x2 average pools between them; called inside a compact module.

    Args:
        x: ``[N, H, W, C]``.
        train: See `selconv_jax.SelectiveConv`.
        make: Makes the layers.
        blocks: Bottlenecks per block.
        widths: Channels of the 3x3 convolutions, per block.
        features: Channels of the sums, per block.
        groups: Groups of the 3x3 convolutions.

    Returns:
        ``[N, H', W', features[-1]]``.
    """
    for index, (layers, width, size) in enumerate(zip(blocks, widths, features, strict=True), start=1):
        if index > 1:
            x = average_pool(x)
        for layer in range(1, layers + 1):
            x = Bottleneck(make, width, size, groups, name=f"block{index}_layer{layer}")(x, train)
    return x
