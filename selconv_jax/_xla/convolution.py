"""Convolutions in NHWC, 1x1 ones as matrix products, and canonical forms of their arguments."""

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from selconv_jax._utils.arguments import is_whole
from selconv_jax._xla.kernel_gradient import (
    Bilinear,
    convolve_by_products,
    products_are_faster,
    with_kernel_derivative,
)
from selconv_jax._xla.materialize import materialize
from selconv_jax._xla.platforms import joins_axes, target_platform
from selconv_jax._xla.vmapped_convolution import convolutions_are_unrolled, unrolled_bilinear
from selconv_jax.errors import ConfigError, nearest

Padding = str | Sequence[tuple[int, int]]

# Named paddings, as in `flax.linen.Conv`. "CAUSAL" is for one spatial dimension.
PADDINGS = ("SAME", "SAME_LOWER", "VALID", "CIRCULAR", "REFLECT", "CAUSAL")


# Channels per group from which one dense convolution per group is faster on CPU.
_LEAST_GROUP_TO_SPLIT = 8


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
    """Cross-correlate ``x`` with ``kernel``, as is usual in neural networks.

    A kernel of one tap without padding or groups is computed as a matrix product over channels, for which
    compilers generate better code.

    Args:
        x: ``[N, *S, C]``.
        kernel: ``[*K, C / groups, O]`` in the dtype of ``x``.
        strides: One per spatial dimension.
        padding: One of `PADDINGS`, or ``(low, high)`` per spatial dimension.
        kernel_dilation: One per spatial dimension.
        groups: Number of channel groups.
        precision: See `jax.lax.Precision`.

    Returns:
        ``[N, *S', O]``.
    """
    taps = kernel.shape[:-2]
    if not taps and groups > 1:  # the compiler's convolution needs a spatial dimension
        y = convolve(
            x[:, None],
            kernel[None],
            strides=(1,),
            padding="VALID",
            kernel_dilation=(1,),
            groups=groups,
            precision=precision,
        )
        return y[:, 0]
    x, padding = _pad(
        x, padding, [(size - 1) * step for size, step in zip(taps, kernel_dilation, strict=True)]
    )
    unpadded = isinstance(padding, str) or all(pair == (0, 0) for pair in padding)
    if groups == 1 and all(size == 1 for size in taps) and unpadded:
        if any(stride != 1 for stride in strides):
            x = x[(slice(None), *(slice(None, None, stride) for stride in strides))]
        kernel = kernel.reshape(kernel.shape[-2:])
        # With more axes the CPU compiler transposes the cotangent to compute the kernel's gradient.
        if not joins_axes(x):
            return jnp.dot(x, kernel, precision=precision)
        rows = materialize(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]))
        return materialize(jnp.dot(rows, kernel, precision=precision)).reshape(
            *x.shape[:-1], kernel.shape[-1]
        )
    window = _Window(
        tuple(strides), padding if isinstance(padding, str) else tuple(padding), tuple(kernel_dilation)
    )
    if groups == 1:
        return materialize(_convolution(materialize(x), kernel, window, precision))
    unit = all(step == 1 for step in (*window.strides, *window.kernel_dilation))
    if unit and kernel.shape[-2] >= _LEAST_GROUP_TO_SPLIT and target_platform() == "cpu":
        # The compiler's gradients of a grouped convolution are many times slower.
        parts = zip(jnp.split(x, groups, axis=-1), jnp.split(kernel, groups, axis=-1), strict=True)
        results = [
            materialize(_convolution(materialize(part), rows, window, precision)) for part, rows in parts
        ]
        return jnp.concatenate(results, axis=-1)
    return _convolution(x, kernel, window, precision, groups)


def _pad(x: jax.Array, padding: Padding, reach: Sequence[int]) -> tuple[jax.Array, Padding]:
    """Apply the paddings that the compiler's convolution does not support.

    Args:
        x: ``[N, *S, C]``.
        padding: As in `convolve`.
        reach: Distance of a kernel's first tap from its last, per spatial dimension.

    Returns:
        The input, padded unless the margin is zeros, and the padding that is left to the convolution.
    """
    if padding == "CAUSAL":
        return x, [(distance, 0) for distance in reach]
    if padding not in ("CIRCULAR", "REFLECT"):
        return x, padding
    margins = [(distance // 2, distance - distance // 2) for distance in reach]
    mode = "wrap" if padding == "CIRCULAR" else "reflect"
    return jnp.pad(x, [(0, 0), *margins, (0, 0)], mode=mode), "VALID"


class _Window(NamedTuple):
    """Window arguments of a convolution; hashable."""

    strides: tuple[int, ...]
    padding: Padding
    kernel_dilation: tuple[int, ...]


def _convolution(
    x: jax.Array, kernel: jax.Array, window: _Window, precision: Any, groups: int = 1
) -> jax.Array:
    rank = kernel.ndim - 2
    spatial = "DHW"[-rank:] if rank <= 3 else "".join(map(str, range(rank)))
    padding = window.padding
    if isinstance(padding, str):
        sizes = zip(kernel.shape[:-2], window.kernel_dilation, strict=True)
        extents = [1 + (size - 1) * step for size, step in sizes]
        padding = lax.padtype_to_pads(x.shape[1:-1], extents, window.strides, padding)
    convolution: Bilinear = functools.partial(
        lax.conv_general_dilated,
        window_strides=window.strides,
        padding=padding,
        rhs_dilation=window.kernel_dilation,
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
        feature_group_count=groups,
        precision=precision,
    )
    by_products: Bilinear | None = None
    unit = all(stride == 1 for stride in window.strides)
    if groups == 1 and unit and joins_axes(x) and products_are_faster(kernel.shape):
        by_products = functools.partial(
            convolve_by_products,
            padding=padding,
            kernel_dilation=window.kernel_dilation,
            precision=precision,
        )
    if convolutions_are_unrolled():
        return unrolled_bilinear(convolution, x, kernel, by_products)
    if by_products is None:
        return convolution(x, kernel)
    return with_kernel_derivative(convolution, by_products, x, kernel)


def canonical_window(value: int | Sequence[int] | None, rank: int, name: str) -> tuple[int, ...]:
    """Expand strides, dilations or sizes to one positive integer per spatial dimension.

    Args:
        value: An integer for all dimensions, or a sequence of ``rank``; None: 1.
        rank: Number of spatial dimensions.
        name: Name of the value in errors.

    Returns:
        A tuple of length ``rank``.

    Raises:
        ConfigError: There are not ``rank`` values, or one is below 1.
    """
    numbers: Any = 1 if value is None else value
    values = tuple(numbers) if isinstance(numbers, Iterable) else (numbers,) * rank
    if len(values) != rank or not all(is_whole(number) and number >= 1 for number in values):
        raise ConfigError(
            f"{name} is {value!r}; it must be a positive integer or {rank} of them, one per spatial "
            "dimension."
        )
    return tuple(map(int, values))


def canonical_padding(padding: str | int | Sequence[int | tuple[int, int]], rank: int) -> Padding:
    """Convert any accepted form of padding to one of `PADDINGS` or one pair per spatial dimension.

    Args:
        padding: One of `PADDINGS`, a number of pixels, or one number or ``(low, high)`` pair per dimension.
        rank: Number of spatial dimensions.

    Returns:
        A string or ``rank`` pairs.

    Raises:
        ConfigError: The padding has none of these forms.
    """
    if isinstance(padding, str):
        if padding not in PADDINGS:
            raise ConfigError(f"padding is {padding!r}. {nearest(padding, PADDINGS)}")
        if padding == "CAUSAL" and rank != 1:
            raise ConfigError(
                f"padding is 'CAUSAL', which is for one spatial dimension; the kernel has {rank}. Give a "
                "(low, high) pair for each."
            )
        return padding
    items: Any = padding if isinstance(padding, Iterable) else (padding,) * rank
    pairs = tuple(tuple(item) if isinstance(item, Iterable) else (item, item) for item in items)
    if len(pairs) != rank or not all(len(pair) == 2 and all(map(is_whole, pair)) for pair in pairs):
        raise ConfigError(
            f"padding is {padding!r}; a kernel of {rank} spatial dimensions needs {rank} numbers or "
            "(low, high) pairs."
        )
    return tuple((int(low), int(high)) for low, high in pairs)
