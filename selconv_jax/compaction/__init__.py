"""Compaction: physically smaller networks that compute the same function."""

from selconv_jax.compaction._files import load_compact, save_compact
from selconv_jax.compaction._network import Compact
from selconv_jax.compaction._plan import CompactionPlan, FrozenModel, compact, plan_compaction
from selconv_jax.compaction._static_conv import LayerLayout

__all__ = [
    "Compact",
    "CompactionPlan",
    "FrozenModel",
    "LayerLayout",
    "compact",
    "load_compact",
    "plan_compaction",
    "save_compact",
]
