"""The training program as functions: configuration, trainer, runs, and what they wrote."""

from typing import TYPE_CHECKING

from selconv_jax._utils.lazy import lazy_exports

# Read by lazy_exports below: at run time, too, these names are imported from here, when first used.
if TYPE_CHECKING:
    from selconv_jax.train._config import (
        AllocationConfig,
        Config,
        DataConfig,
        ModelConfig,
        OptimizerConfig,
        load_config,
    )
    from selconv_jax.train._distributed.sharding import Placement
    from selconv_jax.train._evaluation import evaluate_run
    from selconv_jax.train._loop import NonFiniteLossError, resume_run, train_run
    from selconv_jax.train._metrics import read_metrics
    from selconv_jax.train._network import Program
    from selconv_jax.train._run_setup import restore_run
    from selconv_jax.train._state import Totals, TrainState
    from selconv_jax.train._trainer import Trainer

__all__ = [
    "AllocationConfig",
    "Config",
    "DataConfig",
    "ModelConfig",
    "NonFiniteLossError",
    "OptimizerConfig",
    "Placement",
    "Program",
    "Totals",
    "TrainState",
    "Trainer",
    "evaluate_run",
    "load_config",
    "read_metrics",
    "restore_run",
    "resume_run",
    "train_run",
]

__getattr__, __dir__ = lazy_exports(__name__, __file__, extra="train")
