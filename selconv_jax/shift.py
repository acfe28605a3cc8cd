"""Spatial shift of channels by fractions of a pixel, and the selection that reads through it."""

import jax
import jax.numpy as jnp
from jax import lax

from selconv_jax.batch_norm import statistics_dtype

__all__ = ["channel_shift", "select"]


def channel_shift(x: jax.Array, shift: jax.Array) -> jax.Array:
    """Reads every channel at a position of its own, displaced by ``shift``.

    Multilinear interpolation (method, "One selective layer"): the output at pixel ``(h, w)`` is ``x``
    at ``(h + shift[c, 0], w + shift[c, 1])``, each coordinate clamped to the image. The displacement is
    constant over a channel, so the interpolation separates into one small matrix per axis and channel;
    products with these are exact for any shift, near or far, and differentiate into products again
    instead of scatters.

    Where a coordinate is clamped (on the border itself too) its gradient is 0; at a whole-pixel
    displacement, where the interpolation has a kink, the gradient is the one from above.

    Args:
        x: ``[N, *S, C]`` floating, any number of spatial dimensions ``S``.
        shift: ``[C, len(S)]`` floating, in pixels, in the order of the spatial dimensions (row first).

    Returns:
        ``[N, *S, C]`` in the dtype of ``x``.

    Raises:
        ValueError: The shape of ``shift`` does not belong to ``x``.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.arange(4.0).reshape(1, 4, 1)
        >>> channel_shift(x, jnp.array([[0.5]]))[0, :, 0].tolist()
        [0.5, 1.5, 2.5, 3.0]
    """
    expected = (x.shape[-1], x.ndim - 2)
    if shift.shape != expected:
        raise ValueError(
            f"shift has shape {shift.shape}; an input of shape {x.shape} needs {expected}: "
            "one row per channel, one column per spatial dimension."
        )
    # Channels first, so that every channel is one product with its own matrix. The weights are
    # fractions: without full precision an accelerator would round them to 8 bits.
    y = jnp.moveaxis(x, -1, 0)  # [C, N, *S]
    for axis in range(expected[1]):
        matrix = _interpolation_matrix(shift[:, axis], x.shape[axis + 1], x.dtype)
        y = jnp.moveaxis(y, axis + 2, -1)
        y = jnp.einsum("c...i,coi->c...o", y, matrix, precision=lax.Precision.HIGHEST)
        y = jnp.moveaxis(y, -1, axis + 2)
    return jnp.moveaxis(y, 0, -1)


def _interpolation_matrix(shift: jax.Array, size: int, dtype: jnp.dtype) -> jax.Array:
    """Weights ``[C, out, in]`` of the linear interpolation along one axis, for shifts ``[C]``."""
    # A narrow type cannot even count the pixels of a large image.
    shift = shift.astype(statistics_dtype(shift.dtype))
    column = jnp.arange(size, dtype=shift.dtype)[None, None, :]
    position = column.swapaxes(1, 2) + shift[:, None, None]  # [C, out, 1]
    inside = (position > 0) & (position < size - 1)
    clamped = jnp.clip(lax.stop_gradient(position), 0, size - 1)
    position = jnp.where(inside, position, clamped)
    below = jnp.floor(lax.stop_gradient(position))
    fraction = position - below
    # On the last pixel the fraction is 0 and "below + 1" meets no column.
    zero = jnp.zeros((), shift.dtype)
    lower = jnp.where(column == below, 1 - fraction, zero)
    upper = jnp.where(column == below + 1, fraction, zero)
    return (lower + upper).astype(dtype)


def select(x: jax.Array, source: jax.Array, shift: jax.Array, slots: int | None = None) -> jax.Array:
    """The input as a selective layer sees it (method, "One selective layer", step 1).

    Channel ``j`` of the result is ``x_j`` where ``source[j] = -1``, else the channel ``source[j]`` shifted
    by ``shift[j]``. A channel may be a shifted copy of itself: ``source[j] = j`` differs from -1.

    The cost grows with the number of copies that are provided for, not with the channels. ``slots``
    fixes that number when the program is compiled; the result does not depend on it.

    Args:
        x: ``[N, *S, C]`` floating.
        source: ``[C]`` int32 in ``-1 .. C - 1``.
        shift: ``[C, len(S)]`` floating, in pixels; without effect and without gradient where
            ``source`` is -1.
        slots: Upper bound of the number of copies (entries of ``source`` other than -1); None: ``C``.
            0 returns ``x`` itself. The caller sees to it that there are no more copies: those beyond
            the bound would read their own channels.

    Returns:
        ``[N, *S, C]`` in the dtype of ``x``.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.array([[[1.0, 10.0], [2.0, 20.0]]])
        >>> select(x, jnp.array([-1, 0]), jnp.array([[0.0], [1.0]]))[0].tolist()
        [[1.0, 2.0], [2.0, 2.0]]
    """
    channels = x.shape[-1]
    slots = channels if slots is None else min(slots, channels)
    if slots == 0:
        return x
    # Unused slots lie at index C, outside of the one-hot rows below: they read and write nothing.
    slot = jnp.nonzero(source >= 0, size=slots, fill_value=channels)[0]
    origin = jnp.take(source, slot, mode="fill", fill_value=channels)
    displacement = jnp.take(shift, slot, axis=0, mode="fill", fill_value=0)
    # Products with one-hot matrices, whose gradients are products again and not scatters.
    read = jax.nn.one_hot(origin, channels, dtype=x.dtype, axis=0)  # [C, slots]
    write = jax.nn.one_hot(slot, channels, dtype=x.dtype)  # [slots, C]
    copies = channel_shift(jnp.dot(x, read, precision=lax.Precision.HIGHEST), displacement)
    replaced = lax.expand_dims(jnp.any(write > 0, axis=0), range(x.ndim - 1))
    kept = jnp.where(replaced, jnp.zeros((), x.dtype), x)
    return kept + jnp.dot(copies, write, precision=lax.Precision.HIGHEST)
