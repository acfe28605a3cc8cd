"""Creating the network of a configuration."""

import flax.linen as nn
import jax.numpy as jnp

from selconv_jax.errors import ConfigError
from selconv_jax.models import create_model, stem_for
from selconv_jax.train._config import ModelConfig

__all__ = ["make_network"]

_SET_ELSEWHERE = {
    "num_classes": "it is that of the images, see data.name",
    "variant": "it is model.variant",
    "dtype": "it is model.dtype",
    "param_dtype": "parameters are float32",
    "capacity": "it follows from the allocation",
}


def make_network(config: ModelConfig, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Create the network of a run, for no particular capacity.

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
    for key, origin in _SET_ELSEWHERE.items():
        if key in config.options:
            raise ConfigError(f"model.options.{key} cannot be set: {origin}.")
    arguments = {
        "stem": stem_for(image_shape),
        "variant": config.variant,
        "dtype": jnp.dtype(config.dtype),
        **config.options,
    }
    try:
        return create_model(config.name, num_classes, **arguments)
    except ConfigError as error:
        about_option = str(error).partition(" ")[0] in config.options
        raise ConfigError(f"model.options.{error}" if about_option else str(error)) from None
