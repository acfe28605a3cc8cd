"""A network that cannot look around, and the controls it is compared with."""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from selconv_jax.errors import ConfigError
from selconv_jax.models._network import Network
from selconv_jax.models._parts import (
    Classifier,
    Stem,
    average_pool,
    check_network,
    check_whole,
    selective_conv,
)

__all__ = ["Pointwise"]

# Where the method draws the shifts of new copies from, in pixels; method, "Re-allocation".
_SHIFT_RANGE = 1.5


class Pointwise(Network):
    """A chain of 1x1 convolutions with average pools between the blocks and one over all that is left.

    Plain, it sees of an image what its pools leave: the order of the pixels within a pool's cell is lost to
    it. Whatever it learns about neighbours comes from shifts. It is no network of the method's evaluation; it
    shows the mechanism by itself.

    Attributes:
        num_classes: Number of outputs.
        blocks: Layers per block; a 2x2 average pool lies between blocks.
        widths: Channels that every layer of a block reads, per block.
        kernel_size: Of every convolution, the stem's too. Above 1 it is the control that sees neighbours.
        shifted: Share of every layer's channels that are shifted copies of themselves from the start, at
            shifts drawn as the method draws those of new copies: a control without re-allocation. Channels
            of a new network are alike, so the first ones are taken. Needs the selective variant.
        stem: First convolution, see `parts.STEMS`; stride and pool are taken from there.
        variant: ``"plain"``, ``"selective"``, or ``"gate_only"`` (de-allocation without re-allocation).
        capacity: See `selconv_jax.SelectiveConv`.
        dtype: Type of the computation; None: that of the input.
        param_dtype: Type of the parameters.

    Raises:
        ConfigError: A value is out of bounds or not one of the choices.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> model = Pointwise(num_classes=10, blocks=(1, 1), widths=(4, 8), shifted=0.5)
        >>> variables = model.init(jax.random.key(0), jnp.ones((1, 8, 8, 3)), train=False)
        >>> variables["params"]["block1_layer1"]["kernel"].shape
        (1, 1, 4, 8)
        >>> variables["selectivity"]["block1_layer1"]["source"].tolist()
        [0, 1, -1, -1]
    """

    num_classes: int
    blocks: Sequence[int] = (2, 2, 2)
    widths: Sequence[int] = (32, 32, 32)
    kernel_size: int = 1
    shifted: float = 0.0
    stem: str = "cifar"
    variant: str = "selective"
    capacity: float = 1.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        check_network(self)
        check_whole("kernel_size", self.kernel_size)
        if not self.kernel_size % 2:
            raise ConfigError(f"kernel_size is {self.kernel_size}; it must be odd, to have a centre.")
        if not isinstance(self.widths, tuple | list) or len(self.widths) != len(self.blocks):
            raise ConfigError(
                f"widths is {self.widths!r}; it must be a list of {len(self.blocks)}, like blocks."
            )
        for width in self.widths:
            check_whole("widths", width)
        shifted = self.shifted
        if isinstance(shifted, bool) or not isinstance(shifted, int | float) or not 0 <= shifted <= 1:
            raise ConfigError(f"shifted is {shifted!r}; it must be a share of the channels in [0, 1].")
        if shifted and self.variant != "selective":
            raise ConfigError(
                f'shifted is {shifted}, but layers of the variant "{self.variant}" have no shifts. Set '
                'variant to "selective".'
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Map images ``[N, H, W, C]`` to logits ``[N, num_classes]``."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = Stem(self.widths[0], self.stem, self.kernel_size, **types, name="stem")(images)
        for block, layers in enumerate(self.blocks):
            if block:
                x = average_pool(x)
            for index in range(layers):
                # The last layer of a block makes what the next block reads.
                is_last = index + 1 == layers and block + 1 < len(self.blocks)
                layer = selective_conv(
                    self.variant,
                    self.capacity,
                    features=self.widths[block + is_last],
                    kernel_size=(self.kernel_size, self.kernel_size),
                    **types,
                    name=f"block{block + 1}_layer{index + 1}",
                )
                x = layer(x, train)
                if self.shifted and self.is_initializing():
                    self._shift(layer, self.widths[block])
        return Classifier(self.num_classes, **types, name="classifier")(x, train)

    def _shift(self, layer: nn.Module, channels: int) -> None:
        """Replace the initial values of a layer's sources and shifts."""
        channel = jnp.arange(channels, dtype=jnp.int32)
        is_shifted = channel < math.floor(self.shifted * channels + 0.5)
        drawn = jax.random.uniform(
            self.make_rng("params"), (channels, 2), self.param_dtype, -_SHIFT_RANGE, _SHIFT_RANGE
        )
        layer.put_variable("selectivity", "source", jnp.where(is_shifted, channel, -1))
        layer.put_variable("params", "shift", jnp.where(is_shifted[:, None], drawn, jnp.zeros_like(drawn)))
