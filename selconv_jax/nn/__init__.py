"""Selective and plain convolution layers for Flax Linen."""

from selconv_jax._xla.batch_norm import Statistics, batch_statistics, join_statistics
from selconv_jax.nn._layers import BatchNormReLU, BatchNormReLUConv, SelectiveConv

__all__ = [
    "BatchNormReLU",
    "BatchNormReLUConv",
    "SelectiveConv",
    "Statistics",
    "batch_statistics",
    "join_statistics",
]
