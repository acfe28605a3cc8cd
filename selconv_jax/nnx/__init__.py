"""Selective layers as Flax NNX modules, and the transforms of modules that have them."""

from selconv_jax.nnx._conversion import compact, selectivize_module
from selconv_jax.nnx._layers import BatchNormReLUConv, SelectiveConv, Selectivity
from selconv_jax.nnx._linen import to_linen
from selconv_jax.nnx._linen_module import LinenModule
from selconv_jax.nnx._transforms import fit_capacity, reallocate, reset_rewritten, selectivize
from selconv_jax.nnx._variables import linen_variables, update_module

__all__ = [
    "BatchNormReLUConv",
    "LinenModule",
    "SelectiveConv",
    "Selectivity",
    "compact",
    "fit_capacity",
    "linen_variables",
    "reallocate",
    "reset_rewritten",
    "selectivize",
    "selectivize_module",
    "to_linen",
    "update_module",
]
