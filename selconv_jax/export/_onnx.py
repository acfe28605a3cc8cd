"""ONNX files, converted by jax2onnx and run by onnxruntime."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from selconv_jax._utils.files import check_target
from selconv_jax._xla.platforms import tracing_for
from selconv_jax.errors import ConfigError
from selconv_jax.export._files import import_package, read, symbolic_batch, write
from selconv_jax.export._inlining import inlined

_ERRORS_ONLY = 3  # of onnxruntime's levels of severity


def save_onnx(
    path: str | os.PathLike[str],
    function: Callable[..., Any],
    *inputs: Any,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a function atomically as an ONNX model for a batch of any size but 0.

    Images stay ``[N, H, W, C]``. A network that computes in bfloat16 is best exported in float32
    (``model.clone(dtype=jnp.float32)``): onnxruntime has few operators for it.

    Args:
        path: The file, by convention ``.onnx``.
        function: See `save_stablehlo`.
        *inputs: See `save_stablehlo`.
        input_names: Names of the inputs in the file; None: jax2onnx chooses.
        output_names: Names of the outputs; likewise.
        overwrite: Replace an existing file.

    Raises:
        CheckpointError: The file already exists or cannot be written.
        ConfigError: The package jax2onnx is missing, or the function cannot be converted.
    """
    path = Path(path)
    check_target(path, overwrite=overwrite)
    shapes = symbolic_batch(inputs)
    try:
        with _quiet(), tracing_for("cpu"):
            jax2onnx = import_package("onnx", "jax2onnx")
            model = jax2onnx.to_onnx(
                inlined(function, shapes), shapes, input_names=input_names, output_names=output_names
            )
    except ConfigError:
        raise
    except Exception as error:  # the function and the converter may raise anything
        raise ConfigError(
            f"the function cannot be converted to ONNX: {' '.join(str(error).split())[:300]}"
        ) from error
    write(path, model.SerializeToString())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the converter's warnings, such as those on layers of packages that are not there."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        # The converter mixes types and ranks, which may be configured to be an error.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            yield
    finally:
        logging.disable(before)


def load_onnx(path: str | os.PathLike[str]) -> Callable[..., Any]:
    """Read an ONNX model into onnxruntime, on CPU.

    Args:
        path: The file.

    Returns:
        A function of the model's inputs; returns its output as a NumPy array, or several in a list.

    Raises:
        CheckpointError: The file is missing or damaged.
        ConfigError: The package onnxruntime is missing.
    """
    onnxruntime = import_package("onnx", "onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    session = read(
        Path(path),
        "ONNX",
        lambda file: onnxruntime.InferenceSession(
            file.read_bytes(), options, providers=["CPUExecutionProvider"]
        ),
    )
    names = [one.name for one in session.get_inputs()]

    def call(*inputs: Any) -> Any:
        outputs = session.run(None, dict(zip(names, map(np.asarray, inputs), strict=True)))
        return outputs[0] if len(outputs) == 1 else outputs

    return call
