"""The network that a configuration asks for."""

import flax.linen as nn
import jax.numpy as jnp

from selconv_jax.errors import ConfigError
from selconv_jax.models import create_model, stem_for
from selconv_jax.train.config import ModelConfig

__all__ = ["make_network"]


def make_network(config: ModelConfig, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """The network of a run, for no particular number of slots.

    Args:
        config: The section ``[model]`` of the run.
        image_shape: ``(height, width, channels)`` of its images.
        num_classes: Number of its classes.

    Returns:
        The network.

    Raises:
        ConfigError: The name or an option is unknown, or out of bounds.

    Example:
        >>> make_network(ModelConfig(name="densenet40"), (28, 28, 1), 10).stem
        'cifar'
    """
    for key in ("variant", "dtype", "slots"):
        if key in config.options:
            raise ConfigError(f"model.options.{key} cannot be set: it follows from [model] and the run.")
    arguments = {
        "stem": stem_for(image_shape),
        "variant": config.variant,
        "dtype": jnp.dtype(config.dtype),
        **config.options,
    }
    return create_model(config.name, num_classes, **arguments)
