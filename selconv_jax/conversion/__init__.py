"""Conversion of trained networks of ordinary Flax layers to selective networks."""

from selconv_jax.conversion._selectivize import Conversion, selectivize_model

__all__ = ["Conversion", "selectivize_model"]
