"""Residual blocks of bottlenecks, shared by PreResNet and ResNeXt."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from selconv_jax._xla.batch_norm import batch_statistics
from selconv_jax._xla.materialize import materialize
from selconv_jax.models._network import LayerMaker
from selconv_jax.models._parts import average_pool


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution with a shortcut around them (experiments, "Models").

    The 1x1 convolutions are selective. The 3x3 one is gate-only, or plain if it has groups. The shortcut is
    the identity, padded with channels of zeros, or a selective 1x1 convolution. Its batch norm is its own,
    where timm's networks share that of the first convolution: equal as loaded, apart once trained.

    Attributes:
        make: Makes the layers.
        width: Channels of the 3x3 convolution.
        features: Channels of the sum, at least those of the input.
        groups: Groups of the 3x3 convolution.
        stride: Stride of the shortcut's convolution and of the 3x3 one; None: the shortcut is the identity.
    """

    make: LayerMaker
    width: int
    features: int
    groups: int
    stride: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map ``[N, H, W, C]`` to ``[N, H', W', features]``."""
        statistics = batch_statistics(x) if self.stride and train else None
        y = self.make.selective(self.width, 1, "conv1")(x, train, statistics)
        if self.groups == 1:
            # Padding is symmetric, as in `Stem`.
            window = {"strides": self.stride, "padding": 1} if self.stride else {}
            y = self.make.gated(self.width, 3, "conv2", **window)(y, train)
        else:
            y = self.make.plain(self.width, 3, "conv2", feature_group_count=self.groups)(y, train)
        y = self.make.selective(self.features, 1, "conv3")(y, train)
        if self.stride:
            shortcut = self.make.selective(self.features, 1, "shortcut", strides=self.stride)
            return materialize(y + shortcut(x, train, statistics))
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
    projection: bool = False,
) -> jax.Array:
    """Apply blocks of bottlenecks; called inside a compact module.

    Between the blocks are 2x2 average pools or, with ``projection``, strides.

    Args:
        x: ``[N, H, W, C]``.
        train: See `selconv_jax.SelectiveConv`.
        make: Makes the layers.
        blocks: Bottlenecks per block.
        widths: Channels of the 3x3 convolutions, per block.
        features: Channels of the sums, per block.
        groups: Groups of the 3x3 convolutions; 1 with ``projection``.
        projection: See `PreResNet`.

    Returns:
        ``[N, H', W', features[-1]]``.
    """
    for index, (layers, width, size) in enumerate(zip(blocks, widths, features, strict=True), start=1):
        if index > 1 and not projection:
            x = average_pool(x)
        for layer in range(1, layers + 1):
            stride = min(index, 2) if projection and layer == 1 else None  # the first block has 1
            x = Bottleneck(make, width, size, groups, stride, name=f"block{index}_layer{layer}")(x, train)
    return x
