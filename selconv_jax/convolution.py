"""Convolutions in NHWC, 1x1 ones as matrix products, and the forms their arguments may take."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType

from selconv_jax.errors import ConfigError, nearest

__all__ = ["PADDINGS", "canonical_padding", "canonical_window", "convolve"]

Padding = str | Sequence[tuple[int, int]]

# The paddings that have a name, as in `flax.linen.Conv`. "CAUSAL" is for one spatial dimension.
PADDINGS = ("SAME", "SAME_LOWER", "VALID", "CIRCULAR", "REFLECT", "CAUSAL")


# Channels of a group from which a dense convolution of its own pays on CPU.
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
    """Cross-correlates ``x`` with ``kernel``, as neural networks do.

    A kernel of one tap without padding or groups is a matrix product over channels; compilers make
    better code of that than of a convolution.

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
    x, padding = _pad(
        x, padding, [(size - 1) * step for size, step in zip(taps, kernel_dilation, strict=True)]
    )
    unpadded = isinstance(padding, str) or all(pair == (0, 0) for pair in padding)
    if groups == 1 and all(size == 1 for size in taps) and unpadded:
        if any(stride != 1 for stride in strides):
            x = x[(slice(None), *(slice(None, None, stride) for stride in strides))]
        return jnp.dot(x, kernel.reshape(kernel.shape[-2:]), precision=precision)
    window = _Window(
        tuple(strides), padding if isinstance(padding, str) else tuple(padding), tuple(kernel_dilation)
    )
    unit = all(step == 1 for step in (*window.strides, *window.kernel_dilation))
    if unit and (groups == 1 or kernel.shape[-2] >= _LEAST_GROUP_TO_SPLIT) and _is_for_cpu(x):
        # One dense convolution per group: the compiler's own gradients of groups are many times slower.
        parts = zip(jnp.split(x, groups, axis=-1), jnp.split(kernel, groups, axis=-1), strict=True)
        results = [_dense_convolution(part, rows, window, precision) for part, rows in parts]
        return results[0] if groups == 1 else jnp.concatenate(results, axis=-1)
    return _convolution(x, kernel, window, precision, groups)


def _pad(x: jax.Array, padding: Padding, reach: Sequence[int]) -> tuple[jax.Array, Padding]:
    """Takes care of the paddings that the compiler's convolution does not have.

    Args:
        x: ``[N, *S, C]``.
        padding: As in `convolve`.
        reach: Distance of a kernel's first tap from its last, per spatial dimension.

    Returns:
        The input, padded where the margin is not zero, and the padding that is left to do.
    """
    if padding == "CAUSAL":
        return x, [(distance, 0) for distance in reach]
    if padding not in ("CIRCULAR", "REFLECT"):
        return x, padding
    margins = [(distance // 2, distance - distance // 2) for distance in reach]
    mode = "wrap" if padding == "CIRCULAR" else "reflect"
    return jnp.pad(x, [(0, 0), *margins, (0, 0)], mode=mode), "VALID"


def _is_for_cpu(x: jax.Array) -> bool:
    """Whether the kernel gradient may be a product: on CPU, and where the compiler places arrays.

    On a mesh of explicit axes the product would have to say where it lies.
    """
    explicit = any(kind == AxisType.Explicit for kind in jax.typeof(x).sharding.mesh.axis_types)
    return jax.default_backend() == "cpu" and not explicit


class _Window(NamedTuple):
    """How a kernel moves over the input; hashable."""

    strides: tuple[int, ...]
    padding: Padding
    kernel_dilation: tuple[int, ...]


def _convolution(
    x: jax.Array, kernel: jax.Array, window: _Window, precision: Any, groups: int = 1
) -> jax.Array:
    rank = kernel.ndim - 2
    spatial = "DHW"[-rank:] if rank <= 3 else "".join(map(str, range(rank)))
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=window.strides,
        padding=window.padding,
        rhs_dilation=window.kernel_dilation,
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
        feature_group_count=groups,
        precision=precision,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _dense_convolution(x: jax.Array, kernel: jax.Array, window: _Window, precision: Any) -> jax.Array:
    """A convolution with steps of 1, whose kernel gradient is one matrix product on CPU.

    There the compiler's own convolution for that gradient moves the batch to the last dimension and back,
    which takes several times longer than the arithmetic. As any custom gradient it has no forward mode
    (``jax.jvp``) on CPU; reverse mode, also of itself, is what training needs. A program that is compiled
    on a CPU host for another platform gets that platform's own gradient.
    """
    return _convolution(x, kernel, window, precision)


def _dense_forward(
    x: jax.Array, kernel: jax.Array, window: _Window, precision: Any
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _convolution(x, kernel, window, precision), (x, kernel)


def _dense_backward(
    window: _Window, precision: Any, saved: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    apply = functools.partial(_convolution, window=window, precision=precision)
    _, transpose_x = jax.vjp(lambda x: apply(x, kernel), x)

    def by_convolution(x: jax.Array, cotangent: jax.Array) -> jax.Array:
        return jax.vjp(lambda kernel: apply(x, kernel), kernel)[1](cotangent)[0]

    def by_product(x: jax.Array, cotangent: jax.Array) -> jax.Array:
        return _kernel_gradient(x, cotangent, kernel.shape, window.padding, precision)

    gradient = lax.platform_dependent(x, cotangent, cpu=by_product, default=by_convolution)
    return transpose_x(cotangent)[0], gradient


_dense_convolution.defvjp(_dense_forward, _dense_backward)


def _kernel_gradient(
    x: jax.Array, cotangent: jax.Array, shape: tuple[int, ...], padding: Padding, precision: Any
) -> jax.Array:
    """Gradient of a kernel of ``shape [*K, C, O]``: for each tap one product with a shifted operand.

    The operand with fewer channels is the one that is padded and shifted.
    """
    *taps, channels, features = shape
    spatial = x.shape[1:-1]
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(spatial, taps, (1,) * len(taps), padding)
    if channels <= features:
        moved, size, margins = x, cotangent.shape[1:-1], padding
    else:
        moved, size = cotangent, spatial
        margins = [(tap - 1 - low, tap - 1 - high) for tap, (low, high) in zip(taps, padding, strict=True)]
    config = [(0, 0, 0), *((low, high, 0) for low, high in margins), (0, 0, 0)]
    # Fused into the product, padding and slice would be computed element by element.
    moved = lax.optimization_barrier(lax.pad(moved, jnp.zeros((), moved.dtype), config))

    def product(*tap: int) -> jax.Array:
        start = tap if channels <= features else (last - 1 - at for last, at in zip(taps, tap, strict=True))
        window = tuple(slice(low, low + length) for low, length in zip(start, size, strict=True))
        shifted = lax.optimization_barrier(moved[(slice(None), *window)])
        left, right = (shifted, cotangent) if channels <= features else (x, shifted)
        flat = left.reshape(-1, channels), right.reshape(-1, features)
        return lax.dot_general(*flat, (((0,), (0,)), ((), ())), precision=precision)

    return jnp.stack([product(*tap) for tap in itertools.product(*map(range, taps))]).reshape(shape)


def canonical_window(value: int | Sequence[int] | None, rank: int, name: str) -> tuple[int, ...]:
    """One positive number per spatial dimension, from one for all or one each.

    Args:
        value: A number or a sequence of ``rank`` numbers; None: 1.
        rank: Number of spatial dimensions.
        name: What the value is called in errors.

    Returns:
        A tuple of length ``rank``.

    Raises:
        ConfigError: There are not ``rank`` values, or one is below 1.
    """
    numbers = 1 if value is None else value
    values = (numbers,) * rank if isinstance(numbers, int | np.integer) else tuple(numbers)
    if len(values) != rank or any(number < 1 for number in values):
        raise ConfigError(
            f"{name} is {value!r}; it must be a positive integer or {rank} of them, one per spatial "
            "dimension."
        )
    return tuple(map(int, values))


def canonical_padding(padding: str | int | Sequence[int | tuple[int, int]], rank: int) -> Padding:
    """One of `PADDINGS` or one pair per spatial dimension, from any of the accepted forms.

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
    if isinstance(padding, int | np.integer):
        padding = (padding,) * rank
    pairs = tuple((item, item) if isinstance(item, int | np.integer) else tuple(item) for item in padding)
    if len(pairs) != rank or any(len(pair) != 2 for pair in pairs):
        raise ConfigError(
            f"padding is {padding!r}; a kernel of {rank} spatial dimensions needs {rank} numbers or "
            "(low, high) pairs."
        )
    return tuple((int(low), int(high)) for low, high in pairs)
