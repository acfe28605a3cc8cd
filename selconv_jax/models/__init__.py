"""The networks of the method's evaluation, and one that isolates its mechanism."""

from selconv_jax.models._condensenet import CondenseNet
from selconv_jax.models._densenet import DenseNet
from selconv_jax.models._network import Network
from selconv_jax.models._pointwise import Pointwise
from selconv_jax.models._preresnet import PreResNet
from selconv_jax.models._registry import MODELS, create_model, stem_for
from selconv_jax.models._resnext import ResNeXt

__all__ = [
    "MODELS",
    "CondenseNet",
    "DenseNet",
    "Network",
    "Pointwise",
    "PreResNet",
    "ResNeXt",
    "create_model",
    "stem_for",
]
