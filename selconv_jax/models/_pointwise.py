"""A network of 1x1 convolutions, which see only single pixels, and its controls."""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from selconv_jax._utils.arguments import check_number, check_whole
from selconv_jax.errors import ConfigError
from selconv_jax.models._network import Network
from selconv_jax.models._parts import average_pool

# Largest shift of a new copy, in pixels; method, "Re-allocate".
_SHIFT_RANGE = 1.5


class Pointwise(Network):
    """A chain of 1x1 convolutions with average pools between the blocks and a global one at the end.

    The plain network ignores the order of pixels within a pooling window, so whatever it learns about
    neighbouring pixels comes from shifts. It isolates the mechanism and is not part of the evaluation.

    Attributes:
        blocks: Layers per block; a 2x2 average pool lies between blocks.
        widths: Input channels of every layer of a block, per block.
        kernel_size: Kernel size of all convolutions, including the stem. Above 1, the network is a control
            that sees neighbouring pixels.
        shifted: Fraction of every layer's channels that start as copies of themselves, with shifts drawn as
            for new copies: a control without re-allocation. The first channels are taken, as those of a new
            network are interchangeable. Needs the selective variant.

    See `Network` for the other attributes; of the stem, stride and pool are taken.

    Raises:
        ConfigError: A value is out of bounds or not one of the choices.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from selconv_jax.models import Pointwise
        >>> model = Pointwise(num_classes=10, blocks=(1, 1), widths=(4, 8), shifted=0.5)
        >>> variables = model.init(jax.random.key(0), jnp.ones((1, 8, 8, 3)), train=False)
        >>> variables["params"]["block1_layer1"]["kernel"].shape
        (1, 1, 4, 8)
        >>> variables["selectivity"]["block1_layer1"]["source"].tolist()
        [0, 1, -1, -1]
    """

    blocks: Sequence[int] = (2, 2, 2)
    widths: Sequence[int] = (32, 32, 32)
    kernel_size: int = 1
    shifted: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("kernel_size", self.kernel_size, 1)
        if not self.kernel_size % 2:
            raise ConfigError(f"kernel_size is {self.kernel_size}; it must be odd, to have a centre.")
        self._check_widths("widths", len(self.blocks))
        check_number(
            "shifted", self.shifted, lambda share: 0 <= share <= 1, "a fraction of the channels in [0, 1]"
        )
        if self.shifted and self.variant != "selective":
            raise ConfigError(
                f'shifted is {self.shifted}, but layers of the variant "{self.variant}" have no shifts. Set '
                'variant to "selective".'
            )

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Map images ``[N, H, W, C]`` to logits ``[N, num_classes]``."""
        x = self._stem(self.widths[0], self.kernel_size)(images)
        for block, layers in enumerate(self.blocks):
            if block:
                x = average_pool(x)
            for index in range(layers):
                # The last layer of a block has the width of the next block.
                is_last = index + 1 == layers and block + 1 < len(self.blocks)
                layer = self._make.selective(
                    self.widths[block + is_last], self.kernel_size, f"block{block + 1}_layer{index + 1}"
                )
                x = layer(x, train)
                if self.shifted and self.is_initializing():
                    self._shift(layer, self.widths[block])
        return self._classifier()(x, train)

    def _shift(self, layer: nn.Module, channels: int) -> None:
        """Replace the initial values of a layer's sources and shifts."""
        channel = jnp.arange(channels, dtype=jnp.int32)
        is_shifted = channel < math.floor(self.shifted * channels + 0.5)
        drawn = jax.random.uniform(
            self.make_rng("params"), (channels, 2), self.param_dtype, -_SHIFT_RANGE, _SHIFT_RANGE
        )
        layer.put_variable("selectivity", "source", jnp.where(is_shifted, channel, -1))
        layer.put_variable("params", "shift", jnp.where(is_shifted[:, None], drawn, jnp.zeros_like(drawn)))
