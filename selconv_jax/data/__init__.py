"""Data sets in memory, their preparation, and augmentation inside the jitted step."""

from selconv_jax.data.dataset import DatasetInfo, ImageData, Split
from selconv_jax.data.loading import load

__all__ = ["DatasetInfo", "ImageData", "Split", "load"]
