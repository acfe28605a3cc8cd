"""Selective layers in Flax NNX modules."""

from selconv_jax.nnx._bridge import linen_variables, update_module

__all__ = ["linen_variables", "update_module"]
