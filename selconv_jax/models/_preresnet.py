"""Pre-activation ResNet with bottlenecks, plain or selective."""

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import jax

from selconv_jax._utils.arguments import check_whole
from selconv_jax.models._network import Network
from selconv_jax.models._residual import residual_blocks


class PreResNet(Network):
    """Pre-activation ResNet: 1x1 (selective), 3x3 (gate-only) and 1x1 (selective) around a shortcut.

    Block ``i`` (from 0) has ``p = width * 2 ** i`` channels inside its bottlenecks and ``4 p`` between them;
    the stem has ``width`` (experiments, "Models").

    Attributes:
        blocks: Bottlenecks per block; 164 layers are ``(18, 18, 18)``.
        width: Channels of the stem; None: 64 on ImageNet's stem, 16 on the others.
        projection: The shortcut around the first bottleneck of every block is a 1x1 convolution (selective),
            and the image size halves in that bottleneck instead of in a pool before it, as in timm's
            ``resnetv2`` networks: an extension, for `selconv_jax.interop.torch`.

    See `Network` for the other attributes.

    Raises:
        ConfigError: A value is out of bounds or not one of the choices.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from selconv_jax.models import PreResNet
        >>> model = PreResNet(num_classes=10, blocks=(1, 1), width=4)
        >>> variables = model.init(jax.random.key(0), jnp.ones((1, 8, 8, 3)), train=False)
        >>> variables["params"]["block2_layer1"]["conv3"]["kernel"].shape
        (1, 1, 8, 32)
    """

    blocks: Sequence[int] = (18, 18, 18)
    width: int | None = None
    projection: bool = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.width is not None:
            check_whole("width", self.width, 1)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Map images ``[N, H, W, C]`` to logits ``[N, num_classes]``."""
        width = self.width or (64 if self.stem == "imagenet" else 16)
        widths = [width * 2**index for index in range(len(self.blocks))]
        features = [4 * width for width in widths]
        x = self._stem(width)(images)
        x = residual_blocks(x, train, self._make, self.blocks, widths, features, projection=self.projection)
        return self._classifier()(x, train)
