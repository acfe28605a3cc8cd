"""Selective convolutions for JAX and Flax: CNNs that re-allocate their own channels."""

from typing import TYPE_CHECKING

from selconv_jax._utils.lazy import lazy_exports

# Read by lazy_exports below: at run time, too, these names are imported from here, when first used.
if TYPE_CHECKING:
    from selconv_jax import (
        analysis,
        compaction,
        conversion,
        data,
        errors,
        export,
        functional,
        interop,
        models,
        nn,
        nnx,
        report,
        train,
        transforms,
    )
    from selconv_jax._utils.process import restart_for_cpu
    from selconv_jax.compaction import CompactionPlan, compact, load_compact, plan_compaction, save_compact
    from selconv_jax.conversion import selectivize_model
    from selconv_jax.errors import CheckpointError, ConfigError, DataError, SelconvError
    from selconv_jax.nn import BatchNormReLUConv, SelectiveConv
    from selconv_jax.transforms import (
        AllocationRule,
        LayerReport,
        ReallocationSchedule,
        Report,
        layer_states,
        reallocate,
        required_capacity,
        reset_rewritten,
        rewritten_mask,
        selectivize,
        with_capacity,
    )

__version__ = "0.1.0"

__all__ = [
    "AllocationRule",
    "BatchNormReLUConv",
    "CheckpointError",
    "CompactionPlan",
    "ConfigError",
    "DataError",
    "LayerReport",
    "ReallocationSchedule",
    "Report",
    "SelconvError",
    "SelectiveConv",
    "analysis",
    "compact",
    "compaction",
    "conversion",
    "data",
    "errors",
    "export",
    "functional",
    "interop",
    "layer_states",
    "load_compact",
    "models",
    "nn",
    "nnx",
    "plan_compaction",
    "reallocate",
    "report",
    "required_capacity",
    "reset_rewritten",
    "restart_for_cpu",
    "rewritten_mask",
    "save_compact",
    "selectivize",
    "selectivize_model",
    "train",
    "transforms",
    "with_capacity",
]

__getattr__, __dir__ = lazy_exports(__name__, __file__)
