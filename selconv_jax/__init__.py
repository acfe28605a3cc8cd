"""Selective convolutions for JAX and Flax: CNNs that re-allocate their own channels."""

from selconv_jax import functional
from selconv_jax.compaction import CompactionPlan, compact, load_compact, plan_compaction, save_compact
from selconv_jax.errors import CheckpointError, ConfigError, DataError, SelconvError
from selconv_jax.layer_tree import layer_states
from selconv_jax.layers import PlainConv, SelectiveConv
from selconv_jax.optimizer_state import reset_rewritten, rewritten_mask
from selconv_jax.round_report import LayerReport, Report
from selconv_jax.schedule import ReallocationSchedule
from selconv_jax.transform import Allocation, reallocate, required_slots
from selconv_jax.twin import selectivize

__all__ = [
    "Allocation",
    "CheckpointError",
    "CompactionPlan",
    "ConfigError",
    "DataError",
    "LayerReport",
    "PlainConv",
    "ReallocationSchedule",
    "Report",
    "SelconvError",
    "SelectiveConv",
    "compact",
    "functional",
    "layer_states",
    "load_compact",
    "plan_compaction",
    "reallocate",
    "required_slots",
    "reset_rewritten",
    "rewritten_mask",
    "save_compact",
    "selectivize",
]
