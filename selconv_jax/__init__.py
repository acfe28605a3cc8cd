"""Selective convolutions for JAX and Flax: CNNs that re-allocate their own channels."""

from selconv_jax import functional
from selconv_jax.layers import PlainConv, SelectiveConv

__all__ = ["PlainConv", "SelectiveConv", "functional"]
