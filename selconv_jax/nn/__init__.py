"""Selective and plain convolution layers for Flax Linen."""

from selconv_jax._xla.batch_norm import batch_statistics
from selconv_jax.nn._layers import PlainConv, SelectiveConv

__all__ = ["PlainConv", "SelectiveConv", "batch_statistics"]
