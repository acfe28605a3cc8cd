"""The networks of the method's evaluation."""

from selconv_jax.models.densenet import DenseNet
from selconv_jax.models.registry import MODELS, create_model, stem_for

__all__ = ["MODELS", "DenseNet", "create_model", "stem_for"]
