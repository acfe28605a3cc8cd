"""Pure functions of a model's variables: re-allocation, its schedule, and optimizer state that follows it."""

from selconv_jax.transforms._capacity import FittedCapacity, required_capacity, with_capacity
from selconv_jax.transforms._layer_tree import layer_states
from selconv_jax.transforms._optimizer_state import reset_rewritten, rewritten_mask
from selconv_jax.transforms._reallocation import reallocate
from selconv_jax.transforms._report import LayerReport, Report
from selconv_jax.transforms._rule import AllocationRule
from selconv_jax.transforms._schedule import ReallocationSchedule
from selconv_jax.transforms._selectivize import selectivize

__all__ = [
    "AllocationRule",
    "FittedCapacity",
    "LayerReport",
    "ReallocationSchedule",
    "Report",
    "layer_states",
    "reallocate",
    "required_capacity",
    "reset_rewritten",
    "rewritten_mask",
    "selectivize",
    "with_capacity",
]
