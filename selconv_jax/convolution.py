"""Convolutions in NHWC, 1x1 ones as matrix products, and the forms their arguments may take."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from selconv_jax.errors import ConfigError

__all__ = ["canonical_padding", "canonical_window", "convolve"]

Padding = str | Sequence[tuple[int, int]]


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: Sequence[int],
    padding: Padding,
    kernel_dilation: Sequence[int],
    groups: int = 1,
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array:
    """Cross-correlates ``x`` with ``kernel``, as neural networks do.

    A kernel of one tap without padding or groups is a matrix product over channels; compilers make
    better code of that than of a convolution.

    Args:
        x: ``[N, *S, C]``.
        kernel: ``[*K, C / groups, O]`` in the dtype of ``x``.
        strides: One per spatial dimension.
        padding: ``"SAME"``, ``"VALID"`` or ``(low, high)`` per spatial dimension.
        kernel_dilation: One per spatial dimension.
        groups: Number of channel groups.
        precision: See `jax.lax.Precision`.

    Returns:
        ``[N, *S', O]``.
    """
    rank = kernel.ndim - 2
    taps = kernel.shape[:rank]
    unpadded = isinstance(padding, str) or all(pair == (0, 0) for pair in padding)
    if groups == 1 and all(size == 1 for size in taps) and unpadded:
        if any(stride != 1 for stride in strides):
            x = x[(slice(None), *(slice(None, None, stride) for stride in strides))]
        return jnp.dot(x, kernel.reshape(kernel.shape[rank:]), precision=precision)
    spatial = "DHW"[-rank:] if rank <= 3 else "".join(map(str, range(rank)))
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=tuple(strides),
        padding=padding,
        rhs_dilation=tuple(kernel_dilation),
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
        feature_group_count=groups,
        precision=precision,
    )


def canonical_window(value: int | Sequence[int], rank: int, name: str) -> tuple[int, ...]:
    """One positive number per spatial dimension, from one for all or one each.

    Args:
        value: A number or a sequence of ``rank`` numbers.
        rank: Number of spatial dimensions.
        name: What the value is called in errors.

    Returns:
        A tuple of length ``rank``.

    Raises:
        ConfigError: There are not ``rank`` values, or one is below 1.
    """
    values = (value,) * rank if isinstance(value, int) else tuple(value)
    if len(values) != rank or any(number < 1 for number in values):
        raise ConfigError(
            f"{name} is {value!r}; it must be a positive integer or {rank} of them, one per spatial "
            "dimension."
        )
    return values


def canonical_padding(padding: str | int | Sequence[int | tuple[int, int]], rank: int) -> Padding:
    """``"SAME"``, ``"VALID"`` or one pair per spatial dimension, from any of the accepted forms.

    Args:
        padding: ``"SAME"``, ``"VALID"``, a number of pixels, or one number or ``(low, high)`` pair per
            dimension.
        rank: Number of spatial dimensions.

    Returns:
        A string or ``rank`` pairs.

    Raises:
        ConfigError: The padding has none of these forms.
    """
    if isinstance(padding, str):
        if padding not in ("SAME", "VALID"):
            raise ConfigError(f"padding is {padding!r}; as a string it must be 'SAME' or 'VALID'.")
        return padding
    if isinstance(padding, int):
        padding = (padding,) * rank
    pairs = tuple((item, item) if isinstance(item, int) else tuple(item) for item in padding)
    if len(pairs) != rank or any(len(pair) != 2 for pair in pairs):
        raise ConfigError(
            f"padding is {padding!r}; a kernel of {rank} spatial dimensions needs {rank} numbers or "
            "(low, high) pairs."
        )
    return tuple((int(low), int(high)) for low, high in pairs)
