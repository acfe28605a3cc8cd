"""The networks of the method's evaluation."""

from selconv_jax.models.condensenet import CondenseNet
from selconv_jax.models.densenet import DenseNet
from selconv_jax.models.preresnet import PreResNet
from selconv_jax.models.registry import MODELS, create_model, stem_for
from selconv_jax.models.resnext import ResNeXt

__all__ = ["MODELS", "CondenseNet", "DenseNet", "PreResNet", "ResNeXt", "create_model", "stem_for"]
