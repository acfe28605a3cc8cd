"""ResNeXt in pre-activation form, plain or selective."""

from collections.abc import Sequence

import flax.linen as nn
import jax

from selconv_jax._utils.arguments import check_whole
from selconv_jax.models._network import Network
from selconv_jax.models._residual import residual_blocks


class ResNeXt(Network):
    """ResNeXt: 1x1 (selective), grouped 3x3 (plain) and 1x1 (selective) around a shortcut.

    Block ``i`` (from 0) has ``groups * base_width * 2 ** i`` channels inside its bottlenecks and
    ``64 * widen * 2 ** i`` between them; the stem has 64 (experiments, "Models"). The defaults are
    ResNeXt-29, 8x64d.

    Attributes:
        blocks: Bottlenecks per block.
        groups: Groups of the 3x3 convolutions, also known as the cardinality.
        base_width: Channels of a group in the first block.
        widen: Multiple of 64 that the first block's bottlenecks end with.

    See `Network` for the other attributes.

    Raises:
        ConfigError: A value is out of bounds or not one of the choices.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from selconv_jax.models import ResNeXt
        >>> model = ResNeXt(num_classes=10, blocks=(1, 1), groups=2, base_width=4, widen=1)
        >>> variables = model.init(jax.random.key(0), jnp.ones((1, 8, 8, 3)), train=False)
        >>> variables["params"]["block2_layer1"]["conv2"]["kernel"].shape
        (3, 3, 8, 16)
    """

    blocks: Sequence[int] = (3, 3, 3)
    groups: int = 8
    base_width: int = 64
    widen: int = 4

    def __post_init__(self) -> None:
        for name in ("groups", "base_width", "widen"):
            check_whole(name, getattr(self, name), 1)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Map images ``[N, H, W, C]`` to logits ``[N, num_classes]``."""
        widths = [self.groups * self.base_width * 2**index for index in range(len(self.blocks))]
        features = [64 * self.widen * 2**index for index in range(len(self.blocks))]
        x = self._stem(64)(images)
        x = residual_blocks(x, train, self._make, self.blocks, widths, features, self.groups)
        return self._classifier()(x, train)
