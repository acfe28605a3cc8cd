"""Pictures and tables of runs: learning curves, channel maps and comparisons."""

from selconv_jax._utils.lazy import needs_extra

with needs_extra("train"):
    from selconv_jax.report._channel_map import channel_map
    from selconv_jax.report._curves import learning_curves
    from selconv_jax.report._layer_allocation import LayerAllocation
    from selconv_jax.report._overview import allocation_overview
    from selconv_jax.report._statistics import PairedDifference, Spread, paired_difference, spread
    from selconv_jax.report._style import save_figure
    from selconv_jax.report._tables import count_table, layer_table, run_table

__all__ = [
    "LayerAllocation",
    "PairedDifference",
    "Spread",
    "allocation_overview",
    "channel_map",
    "count_table",
    "layer_table",
    "learning_curves",
    "paired_difference",
    "run_table",
    "save_figure",
    "spread",
]
