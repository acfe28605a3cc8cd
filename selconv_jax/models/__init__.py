"""The networks of the method's evaluation, and one that shows the mechanism by itself."""

from selconv_jax.models.condensenet import CondenseNet
from selconv_jax.models.densenet import DenseNet
from selconv_jax.models.pointwise import Pointwise
from selconv_jax.models.preresnet import PreResNet
from selconv_jax.models.registry import MODELS, create_model, stem_for
from selconv_jax.models.resnext import ResNeXt

__all__ = [
    "MODELS",
    "CondenseNet",
    "DenseNet",
    "Pointwise",
    "PreResNet",
    "ResNeXt",
    "create_model",
    "stem_for",
]
