"""Files that run without this package: StableHLO and ONNX functions, and safetensors of the variables."""

from selconv_jax.export._onnx import load_onnx, save_onnx
from selconv_jax.export._safetensors import load_safetensors, save_safetensors
from selconv_jax.export._stablehlo import load_stablehlo, save_stablehlo

__all__ = [
    "load_onnx",
    "load_safetensors",
    "load_stablehlo",
    "save_onnx",
    "save_safetensors",
    "save_stablehlo",
]
