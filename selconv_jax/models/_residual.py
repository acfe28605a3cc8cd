"""The stages of bottlenecks that PreResNet and ResNeXt share."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from selconv_jax._xla.materialize import materialize
from selconv_jax.models._parts import average_pool, gated_conv, selective_conv
from selconv_jax.nn._layers import BatchNormReLUConv

__all__ = ["Bottleneck", "residual_blocks"]


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution around which the input is added (experiments, "Models").

    The 1x1 convolutions are selective. The 3x3 one is gate-only, or a plain one where it has groups. The
    shortcut is the identity; new channels of the sum start from zero.

    Attributes:
        width: Channels of the 3x3 convolution.
        features: Channels of the sum, at least those of the input.
        groups: Groups of the 3x3 convolution.
        variant: See `parts.VARIANTS`.
        capacity: See `selconv_jax.SelectiveConv`.
        dtype: Type of the computation.
        param_dtype: Type of the parameters.
    """

    width: int
    features: int
    groups: int
    variant: str
    capacity: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map ``[N, H, W, C]`` to ``[N, H, W, features]``."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        pointwise = {"kernel_size": (1, 1), **types}
        window = {"features": self.width, "kernel_size": (3, 3), **types, "name": "conv2"}
        y = selective_conv(self.variant, self.capacity, features=self.width, **pointwise, name="conv1")(
            x, train
        )
        if self.groups == 1:
            y = gated_conv(self.variant, **window)(y, train)
        else:
            y = BatchNormReLUConv(feature_group_count=self.groups, **window)(y, train)
        y = selective_conv(self.variant, self.capacity, features=self.features, **pointwise, name="conv3")(
            y, train
        )
        grown = y.shape[-1] - x.shape[-1]  # which a compacted network has fewer of
        y = y + jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, grown))).astype(y.dtype)
        return materialize(y)


def residual_blocks(
    x: jax.Array,
    train: bool,
    *,
    blocks: Sequence[int],
    widths: Sequence[int],
    features: Sequence[int],
    groups: int = 1,
    **common: Any,
) -> jax.Array:
    """Blocks of bottlenecks with 2x2 average pools between them; called inside a compact module.

    Args:
        x: ``[N, H, W, C]``.
        train: See `selconv_jax.SelectiveConv`.
        blocks: Bottlenecks per block.
        widths: Channels of the 3x3 convolutions, per block.
        features: Channels of the sums, per block.
        groups: Groups of the 3x3 convolutions.
        **common: The other attributes of `Bottleneck`.

    Returns:
        ``[N, H', W', features[-1]]``.
    """
    for index, (layers, width, size) in enumerate(zip(blocks, widths, features, strict=True), start=1):
        if index > 1:
            x = average_pool(x)
        for layer in range(1, layers + 1):
            x = Bottleneck(width, size, groups, **common, name=f"block{index}_layer{layer}")(x, train)
    return x
