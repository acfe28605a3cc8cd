"""Physically smaller networks with the same function."""

from selconv_jax.compaction._files import load_compact, save_compact
from selconv_jax.compaction._module import Compact
from selconv_jax.compaction._plan import CompactionPlan
from selconv_jax.compaction._planning import compact, plan_compaction

__all__ = ["Compact", "CompactionPlan", "compact", "load_compact", "plan_compaction", "save_compact"]
