"""Physically smaller networks with the same function."""

from selconv_jax.compaction.files import load_compact, save_compact
from selconv_jax.compaction.module import Compact
from selconv_jax.compaction.plan import CompactionPlan
from selconv_jax.compaction.planning import compact, plan_compaction

__all__ = ["Compact", "CompactionPlan", "compact", "load_compact", "plan_compaction", "save_compact"]
