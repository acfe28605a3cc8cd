"""Registry of the networks by name."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn

from selconv_jax.errors import ConfigError, nearest
from selconv_jax.models._condensenet import CondenseNet
from selconv_jax.models._densenet import DenseNet
from selconv_jax.models._pointwise import Pointwise
from selconv_jax.models._preresnet import PreResNet
from selconv_jax.models._resnext import ResNeXt

# Network class and arguments of each name.
MODELS: Mapping[str, tuple[Callable[..., nn.Module], Mapping[str, Any]]] = {
    "densenet40": (DenseNet, {"blocks": (6, 6, 6), "growth": 12}),
    "densenet100": (DenseNet, {"blocks": (16, 16, 16), "growth": 12}),
    "densenet_bc190": (DenseNet, {"blocks": (31, 31, 31), "growth": 40, "compression": 0.5}),
    "densenet121": (DenseNet, {"blocks": (6, 12, 24, 16), "growth": 32, "compression": 0.5}),
    "preresnet164": (PreResNet, {"blocks": (18, 18, 18)}),
    "preresnet50": (PreResNet, {"blocks": (3, 4, 6, 3), "width": 64}),
    "resnext29": (ResNeXt, {"blocks": (3, 3, 3), "groups": 8, "base_width": 64, "widen": 4}),
    "condensenet182": (CondenseNet, {"blocks": (30, 30, 30), "growth": (12, 24, 48), "groups": 4}),
    "pointwise": (Pointwise, {}),
}


def create_model(name: str, num_classes: int, **arguments: Any) -> nn.Module:
    """Build a network by name.

    Args:
        name: A key of `MODELS`.
        num_classes: Number of outputs.
        **arguments: Arguments of the network that override those of the name, such as ``stem``, ``variant``,
            ``dtype``, ``growth``. Lists are converted to tuples.

    Returns:
        A Flax module, called as ``model.apply(variables, images, train=...)``.

    Raises:
        ConfigError: The name or an argument is unknown, or a value is out of bounds.

    Example:
        >>> from selconv_jax.models import create_model
        >>> create_model("densenet100", num_classes=10, variant="plain").blocks
        (16, 16, 16)
    """
    if name not in MODELS:
        raise ConfigError(f"there is no model {name!r}. {nearest(name, MODELS)}")
    network, defaults = MODELS[name]
    known = inspect.signature(network).parameters.keys() - {"parent", "name", "num_classes"}
    for key in arguments:
        if key not in known:
            raise ConfigError(f"model {name} has no option {key!r}. {nearest(key, known)}")
    chosen = {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
    return network(num_classes=num_classes, **{**defaults, **chosen})


def stem_for(image_shape: Sequence[int]) -> str:
    """Return the stem that the method's experiments use for images of shape ``(H, W, C)``."""
    size = min(image_shape[:2])
    return "cifar" if size <= 48 else "tiny_imagenet" if size <= 96 else "imagenet"
