"""Pictures and tables of a run: learning curves, channel maps, and the method explained."""

from selconv_jax.report.channel_map import channel_map
from selconv_jax.report.curves import learning_curves
from selconv_jax.report.layer_allocation import LayerAllocation
from selconv_jax.report.method_picture import method_picture
from selconv_jax.report.overview import allocation_overview
from selconv_jax.report.save import save_figure
from selconv_jax.report.tables import count_table, layer_table, run_table

__all__ = [
    "LayerAllocation",
    "allocation_overview",
    "channel_map",
    "count_table",
    "layer_table",
    "learning_curves",
    "method_picture",
    "run_table",
    "save_figure",
]
