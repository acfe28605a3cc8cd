"""Compaction: physically smaller networks that compute the same function."""

from selconv_jax.compaction._files import load_compact, save_compact
from selconv_jax.compaction._network import Compact
from selconv_jax.compaction._plan import CompactionPlan, compact, plan_compaction

__all__ = ["Compact", "CompactionPlan", "compact", "load_compact", "plan_compaction", "save_compact"]
