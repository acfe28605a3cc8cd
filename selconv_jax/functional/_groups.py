"""Kernel entries by the input channel that they read, in convolutions with and without groups."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def group_count(channels: int, kernel_shape: Sequence[int]) -> int:
    """Infer the number of groups ``G`` of a convolution from its shapes.

    Output ``o`` belongs to group ``o // (O / G)`` and reads the ``C / G`` input channels of that group.

    Args:
        channels: Number of input channels ``C``.
        kernel_shape: Shape of the kernel, ``[*K, C / G, O]``.

    Returns:
        ``G``; 1 without groups.

    Raises:
        ValueError: The kernel does not fit a layer with this number of input channels.

    Example:
        >>> group_count(8, (3, 3, 2, 16))
        4
    """
    rows, outputs = kernel_shape[-2:]
    groups = channels // rows if rows else 0
    if groups < 1 or groups * rows != channels or outputs % groups:
        raise ValueError(
            f"kernel has shape {tuple(kernel_shape)} for {channels} input channels; expected "
            "[*K, C / groups, O] with the number of groups a divisor of C and O."
        )
    return groups


def kernel_rows(values: jax.Array, kernel_shape: Sequence[int]) -> jax.Array:
    """Lay out one value per input channel so that it broadcasts against the kernel entries reading it.

    Input channel ``c`` is read by ``kernel[..., c % (C / G), o]`` for the outputs ``o`` of its group.

    Args:
        values: ``[*L, C]``; the leading axes are those of stacked layers.
        kernel_shape: Shape of the kernel, ``[*L, *K, C / G, O]``.

    Returns:
        ``[*L, *1, C / G, O]``, or ``[*L, *1, C, 1]`` without groups.

    Raises:
        ValueError: See `group_count`.

    Example:
        >>> import jax.numpy as jnp
        >>> kernel_rows(jnp.array([1, 2, 3, 4]), (2, 2)).tolist()  # C = 4, O = 2, two groups
        [[1, 3], [2, 4]]
    """
    *stack, channels = values.shape
    groups = group_count(channels, kernel_shape)
    rows = values.reshape(*stack, groups, channels // groups).swapaxes(-1, -2)  # [*L, C / G, G]
    if groups > 1:
        rows = jnp.repeat(rows, kernel_shape[-1] // groups, axis=-1)
    window = len(kernel_shape) - len(stack) - 2
    return rows.reshape(*stack, *(1,) * window, *rows.shape[-2:])


def without_rows(kernel: jax.Array, closed: jax.Array, value: float = 0.0) -> jax.Array:
    """Set the kernel rows of some input channels to a constant; 0 closes them, at no cost per pixel.

    Args:
        kernel: ``[*K, C / groups, O]`` floating.
        closed: ``[C]`` bool, the channels whose rows are set.
        value: The constant.

    Returns:
        ``[*K, C / groups, O]``.
    """
    # As an array of NumPy, a constant NaN that is not selected is no error under `jax_debug_nans`.
    return jnp.where(kernel_rows(closed, kernel.shape), np.asarray(value, kernel.dtype), kernel)
