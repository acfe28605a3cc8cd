"""ResNeXt in pre-activation form, plain or selective."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from selconv_jax.models._network import Network
from selconv_jax.models._parts import Classifier, Stem, check_network, check_whole
from selconv_jax.models._residual import residual_blocks

__all__ = ["ResNeXt"]


class ResNeXt(Network):
    """ResNeXt: 1x1 (selective), grouped 3x3 (plain) and 1x1 (selective) around a shortcut.

    Block ``i`` (from 0) has ``groups * base_width * 2 ** i`` channels inside its bottlenecks and
    ``64 * widen * 2 ** i`` between them; the stem has 64 (experiments, "Models"). The defaults are
    ResNeXt-29, 8x64d.

    Attributes:
        num_classes: Number of outputs.
        blocks: Bottlenecks per block.
        groups: Groups of the 3x3 convolutions, also known as the cardinality.
        base_width: Channels of a group in the first block.
        widen: Multiple of 64 that the first block's bottlenecks end with.
        stem: First convolution, see `parts.STEMS`.
        variant: ``"plain"``, ``"selective"``, or ``"gate_only"`` (de-allocation without re-allocation).
        capacity: See `selconv_jax.SelectiveConv`.
        dtype: Type of the computation; None: that of the input.
        param_dtype: Type of the parameters.

    Raises:
        ConfigError: A value is out of bounds or not one of the choices.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> model = ResNeXt(num_classes=10, blocks=(1, 1), groups=2, base_width=4, widen=1)
        >>> variables = model.init(jax.random.key(0), jnp.ones((1, 8, 8, 3)), train=False)
        >>> variables["params"]["block2_layer1"]["conv2"]["kernel"].shape
        (3, 3, 8, 16)
    """

    num_classes: int
    blocks: Sequence[int] = (3, 3, 3)
    groups: int = 8
    base_width: int = 64
    widen: int = 4
    stem: str = "cifar"
    variant: str = "selective"
    capacity: float = 1.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        check_network(self)
        for name in ("groups", "base_width", "widen"):
            check_whole(name, getattr(self, name))
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Map images ``[N, H, W, C]`` to logits ``[N, num_classes]``."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = residual_blocks(
            Stem(64, self.stem, **types, name="stem")(images),
            train,
            blocks=self.blocks,
            widths=[self.groups * self.base_width * 2**index for index in range(len(self.blocks))],
            features=[64 * self.widen * 2**index for index in range(len(self.blocks))],
            groups=self.groups,
            variant=self.variant,
            capacity=self.capacity,
            **types,
        )
        return Classifier(self.num_classes, **types, name="classifier")(x, train)
