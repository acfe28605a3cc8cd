"""Trainable parameters and multiply-adds (MACs) of a network, in total and by layer."""

from selconv_jax.analysis._counting import count_multiply_adds, count_parameters
from selconv_jax.analysis._layer_counts import Count, LayerCounts, count_layers, total_counts

__all__ = ["Count", "LayerCounts", "count_layers", "count_multiply_adds", "count_parameters", "total_counts"]
