"""Gradient of a convolution's kernel by matrix products, for the CPU compiler."""

import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from selconv_jax._xla.materialize import materialize

Array = jax.Array
Bilinear = Callable[[Array, Array], Array]

# Measured on two cores with jax 0.10.1 and 0.12.0, for 4 to 64 images of 8x8 to 224x224 pixels.
_MOST_TAPS = 9
_MOST_TAPS_OF_AN_AXIS = 3
_LEAST_CHANNELS = 24


def products_are_faster(shape: Sequence[int]) -> bool:
    """Check whether `convolve_by_products` has the faster gradient for a kernel ``[*K, C, O]`` on CPU."""
    *taps, channels, features = shape
    return (
        math.prod(taps) <= _MOST_TAPS
        and max(taps) <= _MOST_TAPS_OF_AN_AXIS
        and max(channels, features) >= _LEAST_CHANNELS
    )


def with_kernel_derivative(convolution: Bilinear, of_kernel: Bilinear, x: Array, kernel: Array) -> Array:
    """Call a convolution whose derivative by the kernel is computed by another formulation of it.

    Args:
        convolution: From the input and the kernel to the output.
        of_kernel: The same function, such as from `convolve_by_products`.
        x: The input.
        kernel: The kernel.

    Returns:
        ``convolution(x, kernel)``.
    """

    @jax.custom_jvp
    def call(x: Array, kernel: Array) -> Array:
        return convolution(x, kernel)

    def derivative(primals: tuple[Array, Array], tangents: tuple[Any, Any]) -> tuple[Array, Any]:
        (x, kernel), (of_x, change) = primals, tangents
        parts = []
        if not isinstance(of_x, SymbolicZero):
            parts.append(convolution(of_x, kernel))
        if not isinstance(change, SymbolicZero):
            parts.append(of_kernel(x, change))
        output = call(x, kernel)
        return output, _sum(parts) if parts else jnp.zeros_like(output)

    call.defjvp(derivative, symbolic_zeros=True)
    return call(x, kernel)


def convolve_by_products(
    x: Array,
    kernel: Array,
    padding: Sequence[tuple[int, int]],
    kernel_dilation: Sequence[int],
    precision: Any = None,
) -> Array:
    """Cross-correlate with strides of 1, as products of pixels with taps.

    It is slower than a convolution. But its transpose with respect to the kernel is fast: of input and
    cotangent, the one with fewer channels is moved by the taps of the last axis and concatenated, then moved
    along the other axes and multiplied with the other one. The CPU compiler's own gradient is a convolution
    with the batch as channels, for which it transposes both.

    Args:
        x: ``[N, *S, C]``.
        kernel: ``[*K, C, O]`` in the dtype of ``x``.
        padding: ``(low, high)`` per spatial dimension.
        kernel_dilation: One per spatial dimension.
        precision: See `jax.lax.Precision`.

    Returns:
        ``[N, *S', O]``.
    """
    *taps, channels, features = kernel.shape
    width = taps[-1]

    def moved(values: Array, axis: int, tap: int) -> Array:
        """Move ``[N, *S, ...]`` so that what a tap reads lies at the output's position."""
        low, high = padding[axis]
        step = kernel_dilation[axis]
        borders = [(0, 0, 0)] * values.ndim
        borders[axis + 1] = (low - tap * step, high - (taps[axis] - 1 - tap) * step, 0)
        return lax.pad(values, jnp.zeros((), values.dtype), borders)

    def moved_along(values: Array, index: Sequence[int]) -> Array:
        for axis, tap in enumerate(index):
            values = moved(values, axis, tap)
        return values

    others = list(itertools.product(*map(range, taps[:-1])))
    last = len(taps) - 1
    if channels < features:
        wide = materialize(jnp.concatenate([moved(x, last, tap) for tap in range(width)], axis=-1))
        return _sum(
            jnp.dot(moved_along(wide, index), kernel[index].reshape(-1, features), precision=precision)
            for index in others
        )
    rows = materialize(x.reshape(-1, channels))
    columns = jnp.moveaxis(kernel, -3, -2).reshape(*taps[:-1], channels, width * features)
    products = (materialize(jnp.dot(rows, columns[index], precision=precision)) for index in others)
    shape = (*x.shape[:-1], width * features)
    wide = _sum(moved_along(each.reshape(shape), index) for each, index in zip(products, others, strict=True))
    parts = jnp.split(materialize(wide), width, axis=-1)
    return _sum(moved(part, last, tap) for tap, part in enumerate(parts))


def _sum(values: Iterable[Array]) -> Array:
    return functools.reduce(operator.add, values)
