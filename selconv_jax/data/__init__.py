"""Data sets in memory or streamed, and their preparation."""

from selconv_jax._utils.lazy import needs_extra

with needs_extra("train"):
    from selconv_jax.data._dataset import DatasetInfo, ImageData, Split
    from selconv_jax.data._loading import load, open_data
    from selconv_jax.data._splits import SplitChoice
    from selconv_jax.data._stream import ImageSource, StreamedData

__all__ = [
    "DatasetInfo",
    "ImageData",
    "ImageSource",
    "Split",
    "SplitChoice",
    "StreamedData",
    "load",
    "open_data",
]
