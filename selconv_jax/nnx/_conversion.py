"""Compaction and conversion of NNX modules, whose results are Linen models inside a module."""

from typing import Any

import flax.linen as nn
from flax import nnx

from selconv_jax import compaction, conversion
from selconv_jax.nnx._linen import to_linen
from selconv_jax.nnx._linen_module import LinenModule


def compact(
    module: nnx.Module, *inputs: Any, multiple: int = 1, rngs: nnx.Rngs | None = None, **options: Any
) -> LinenModule:
    """Remove closed channels and all computations whose results are unused, see `selconv_jax.compact`.

    Linen layers in ``nnx.bridge.ToNNX`` stay as they are.

    Args:
        module: The module; it is not changed.
        *inputs: Inputs of the module: arrays or `jax.ShapeDtypeStruct`, as only shapes matter.
        multiple: Widths are rounded up to a multiple of this number.
        rngs: Generators with a stream ``dropout``, for training on a module with dropout.
        **options: Keyword arguments that are the same in every call.

    Returns:
        The smaller module, in the mode of a new one; call ``eval()`` for evaluation.

    Raises:
        ConfigError: The module does not run on the inputs, or an argument is missing or out of bounds.

    Example:
        >>> import jax, jax.numpy as jnp, selconv_jax
        >>> from flax import nnx
        >>> module = selconv_jax.nnx.SelectiveConv(16, 4, (3, 3), rngs=nnx.Rngs(0))
        >>> module.gate[...] = jnp.arange(16) < 6
        >>> small = selconv_jax.nnx.compact(module, jnp.ones((1, 8, 8, 16)))
        >>> small.network["kernel"].shape
        (3, 3, 6, 4)
    """
    model, variables = _linen_form(module)
    small, small_variables = compaction.compact(model, variables, *inputs, multiple=multiple, **options)
    return LinenModule(small, small_variables, rngs)


def selectivize_module(
    module: nnx.Module, *inputs: Any, rngs: nnx.Rngs | None = None, **options: Any
) -> tuple[LinenModule, conversion.Conversion]:
    """Convert a trained module of ordinary layers to a selective one, see `selconv_jax.selectivize_model`.

    Every ``nnx.Conv(..., use_bias=False)`` whose input is the ReLU of an ``nnx.BatchNorm`` becomes selective.

    Args:
        module: The module; it is not changed.
        *inputs: Inputs of the module: arrays or `jax.ShapeDtypeStruct`, as only shapes matter.
        rngs: Generators with a stream ``dropout``, for training on a module with dropout.
        **options: Keyword arguments of the calls, and ``capacity`` and ``gate_only`` of
            `selconv_jax.SelectiveConv`.

    Returns:
        The selective module, in the mode of a new one, and what was converted and what was not.

    Raises:
        ConfigError: The module does not run on the inputs, or no layer of it can be converted.

    Example:
        >>> import jax.numpy as jnp, selconv_jax
        >>> from flax import nnx
        >>> rngs = nnx.Rngs(0)
        >>> conv = nnx.Conv(8, 4, (3, 3), use_bias=False, rngs=rngs)
        >>> module = nnx.Sequential(nnx.BatchNorm(8, rngs=rngs), nnx.relu, conv)
        >>> selective, result = selconv_jax.nnx.selectivize_module(module, jnp.ones((1, 8, 8, 8)))
        >>> result.converted
        {'layers/2': 'layers/0'}
    """
    result = conversion.selectivize_model(*_linen_form(module), *inputs, **options)
    return LinenModule(result.model, result.variables, rngs), result


def _linen_form(module: nnx.Module) -> tuple[nn.Module, dict[str, Any]]:
    """Return the Linen model of a module and its variables; those inside a `LinenModule` as they are."""
    return (module.model, module.variables()) if isinstance(module, LinenModule) else to_linen(module)
