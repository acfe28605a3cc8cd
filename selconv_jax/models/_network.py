"""The base class of the networks."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from selconv_jax.models._parts import STEMS

__all__ = ["Network"]

# Sizes of the images that the stems are for (experiments, "Stem").
_STEM_IMAGES = {"cifar": 32, "tiny_imagenet": 64, "imagenet": 224}


class Network(nn.Module):
    """A network of images, called as ``apply(variables, images, train=...)``.

    Subclasses have the attributes ``stem`` and ``blocks``, one entry for each stage after which the images
    are half as large, and ``dtype``.
    """

    @nn.nowrap
    def example_images(self, variables: Mapping[str, Any]) -> jax.ShapeDtypeStruct:
        """Shape and type ``[1, H, W, C]`` of an image that the network takes.

        Args:
            variables: The network's variables, or their shapes: they hold the number of colours.

        Raises:
            ValueError: The variables are not the network's.
        """
        network: Any = self
        try:
            colours = variables["params"]["stem"]["kernel"].shape[-2]
        except KeyError as error:
            raise ValueError(
                "the variables have no params/stem/kernel: they are not the network's."
            ) from error
        _, stride, pool = STEMS[network.stem]
        least = stride * (2 if pool else 1) * 2 ** len(network.blocks)  # large enough for all pools
        size = max(_STEM_IMAGES[network.stem], least)
        return jax.ShapeDtypeStruct((1, size, size, colours), network.dtype or jnp.float32)
