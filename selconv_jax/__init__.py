"""Selective convolutions for JAX and Flax: CNNs that re-allocate their own channels."""

import importlib
from typing import TYPE_CHECKING, Any

from selconv_jax.errors import CheckpointError, ConfigError, DataError, SelconvError

if TYPE_CHECKING:
    from selconv_jax import functional
    from selconv_jax.compaction import CompactionPlan, compact, load_compact, plan_compaction, save_compact
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

# Where each name comes from. Imported when first asked for: the command line answers a question for help, and
# settles what JAX reads from the environment, before JAX is imported, which takes a second.
_HOMES = {
    "CompactionPlan": "compaction",
    "compact": "compaction",
    "load_compact": "compaction",
    "plan_compaction": "compaction",
    "save_compact": "compaction",
    "layer_states": "layer_tree",
    "PlainConv": "layers",
    "SelectiveConv": "layers",
    "reset_rewritten": "optimizer_state",
    "rewritten_mask": "optimizer_state",
    "ReallocationSchedule": "schedule",
    "Allocation": "transform",
    "LayerReport": "round_report",
    "Report": "round_report",
    "reallocate": "transform",
    "required_slots": "transform",
    "selectivize": "twin",
}


def __getattr__(name: str) -> Any:
    if name == "functional":
        return importlib.import_module("selconv_jax.functional")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"selconv_jax.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
