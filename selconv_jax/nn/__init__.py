"""Selective and plain convolution layers for Flax Linen."""

from selconv_jax._xla.batch_norm import Statistics, batch_statistics, join_statistics
from selconv_jax.nn._layers import BatchNormReLUConv, SelectiveConv

__all__ = ["BatchNormReLUConv", "SelectiveConv", "Statistics", "batch_statistics", "join_statistics"]
