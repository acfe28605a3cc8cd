"""Subpixel spatial shift of channels."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from selconv_jax._utils.arguments import check_dtype
from selconv_jax._xla.batch_norm import statistics_dtype


def channel_shift(x: jax.Array, shift: jax.Array) -> jax.Array:
    """Shift each channel spatially by its own displacement.

    Multilinear interpolation (method, "One selective layer"): the output at pixel ``(h, w)`` is ``x``
    at ``(h + shift[c, 0], w + shift[c, 1])``, each coordinate clamped to the image. The displacement is
    constant over a channel, so the interpolation separates into one small matrix per axis and channel.
    The products are exact for shifts of any size, and their gradients are products too, not scatters.

    The gradient is 0 where a coordinate is clamped or lies exactly on the border. At a whole-pixel
    displacement, where the interpolation has a kink, it is the right-hand derivative.

    Args:
        x: ``[N, *S, C]`` floating, any number of spatial dimensions ``S``.
        shift: ``[C, len(S)]`` floating, in pixels, in the order of the spatial dimensions (row first).

    Returns:
        ``[N, *S, C]`` in the dtype of ``x``.

    Raises:
        ValueError: ``x`` is not floating, or the shape of ``shift`` does not match it.

    Example:
        >>> import jax.numpy as jnp
        >>> from selconv_jax.functional import channel_shift
        >>> x = jnp.arange(4.0).reshape(1, 4, 1)
        >>> channel_shift(x, jnp.array([[0.5]]))[0, :, 0].tolist()
        [0.5, 1.5, 2.5, 3.0]
    """
    check_shifted(x, shift)
    # Channels are a batch axis: each is multiplied by its own matrix. The weights are fractions, which
    # an accelerator would round to 8 bits without full precision.
    product = functools.partial(lax.dot_general, precision=lax.Precision.HIGHEST)
    spatial = list(range(1, x.ndim - 1))
    order = [x.ndim - 1, 0, *spatial]  # the dimensions of x in those of y
    y = jnp.transpose(x, order)
    matrices = _interpolation_matrices(shift, x.shape[1:-1], x.dtype)
    for axis, matrix in zip(spatial, matrices, strict=True):
        at = order.index(axis)
        if at == y.ndim - 1:
            y = product(y, matrix, (((at,), (2,)), ((0,), (0,))))
        else:
            # The product puts this dimension first. It stays there: moving it back would be a transposition.
            order.insert(1, order.pop(at))
            y = product(matrix, jnp.moveaxis(y, at, 1), (((2,), (1,)), ((0,), (0,))))
    return jnp.transpose(y, [order.index(axis) for axis in range(x.ndim)])


def check_shifted(x: jax.Array, shift: jax.Array) -> None:
    """Raise a ValueError unless ``x`` can be shifted by ``shift``, see `channel_shift`."""
    check_dtype("x", x, np.floating, "floating, as interpolation weights are fractions")
    expected = (x.shape[-1], x.ndim - 2)
    if shift.shape != expected:
        raise ValueError(
            f"shift has shape {shift.shape}; an input of shape {x.shape} needs {expected}: "
            "one row per channel, one column per spatial dimension."
        )


def _interpolation_matrices(shift: jax.Array, sizes: Sequence[int], dtype: jnp.dtype) -> list[jax.Array]:
    """Compute the interpolation weights ``[C, out, in]`` along each dimension, for shifts ``[C, len(S)]``."""
    if len(set(sizes)) == 1:
        # Dimensions of equal size are computed together, which makes a smaller program.
        return list(jax.vmap(_interpolation_matrix, in_axes=(1, None, None))(shift, sizes[0], dtype))
    return [_interpolation_matrix(shift[:, axis], size, dtype) for axis, size in enumerate(sizes)]


def _interpolation_matrix(shift: jax.Array, size: int, dtype: jnp.dtype) -> jax.Array:
    """Compute the interpolation weights ``[C, out, in]`` along one dimension, for shifts ``[C]``."""
    # A narrow type cannot even represent every pixel index of a large image.
    shift = shift.astype(statistics_dtype(shift.dtype))
    column = jnp.arange(size, dtype=shift.dtype)[None, None, :]
    position = column.swapaxes(1, 2) + shift[:, None, None]  # [C, out, 1]
    inside = (position > 0) & (position < size - 1)
    clamped = jnp.clip(lax.stop_gradient(position), 0, size - 1)
    position = jnp.where(inside, position, clamped)
    below = jnp.floor(lax.stop_gradient(position))
    fraction = position - below
    # On the last pixel the fraction is 0 and no column equals "below + 1".
    zero = jnp.zeros((), shift.dtype)
    # NaN equals no column; multiplying by 0 instead of writing 0 propagates it.
    lower = jnp.where(column == below, 1 - fraction, 0 * lax.stop_gradient(fraction))
    upper = jnp.where(column == below + 1, fraction, zero)
    return (lower + upper).astype(dtype)
