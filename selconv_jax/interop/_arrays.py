"""One array from the authors' layout, type and unit to ours, and back."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from selconv_jax.interop._names import Entry
from selconv_jax.interop._shift_units import ShiftUnits

__all__ = ["find_fault", "from_torch", "to_numpy", "to_torch", "torch_shape"]

Array = NDArray[Any]


def torch_shape(entry: Entry) -> tuple[int, ...]:
    """The shape of their array: kernels are ``[O, I, *K]`` there, and ``[*K, I, O]`` here.

    Example:
        >>> torch_shape(Entry(("params", "stem", "kernel"), "features.conv0.weight", (3, 3, 1, 8)))
        (8, 1, 3, 3)
    """
    if entry.field == "kernel":
        return (entry.shape[-1], entry.shape[-2], *entry.shape[:-2])
    return entry.shape


def to_numpy(value: Any) -> Array:
    """An array of NumPy or JAX, or a tensor of PyTorch, as a NumPy array."""
    if hasattr(value, "detach"):  # a tensor, perhaps on an accelerator
        value = value.detach().cpu()
        if value.is_floating_point() and value.element_size() < 4:  # NumPy lacks some of those
            value = value.float()
    return np.asarray(value)


def find_fault(entry: Entry, array: Array, dtype: np.dtype[Any]) -> str | None:
    """Look for values that the variable cannot have.

    Args:
        entry: The variable.
        array: Theirs, of the shape `torch_shape`.
        dtype: The type it will have here; a number that overflows there is a fault, too.

    Returns:
        What is wrong; None: nothing.
    """
    if entry.field == "source":
        if array.dtype.kind not in "iu":
            return f"{array.dtype} instead of whole numbers"
        bad = (array < -1) | (array >= entry.shape[0])
        expected = f"-1 or a channel in 0 .. {entry.shape[0] - 1}"
    elif entry.field == "gate":
        bad, expected = ~np.isin(array, (0, 1)), "0 or 1"
    elif not jnp.issubdtype(array.dtype, jnp.floating):
        return f"{array.dtype} instead of floating numbers"
    else:
        with np.errstate(over="ignore"):
            bad, expected = ~np.isfinite(array.astype(dtype)), f"a finite {dtype}"
        if entry.field == "var":
            bad, expected = bad | (array < 0), f"{expected} of at least 0"
    return f"{array[bad][0]} instead of {expected}" if bad.any() else None


def from_torch(entry: Entry, array: Array, dtype: np.dtype[Any], units: ShiftUnits) -> Array:
    """Turn their array into ours.

    Args:
        entry: The variable.
        array: Theirs, without faults.
        dtype: The type it will have here.
        units: Their units of shifts.

    Returns:
        An array of ``entry.shape``.
    """
    if entry.field == "kernel":
        array = np.moveaxis(array, (0, 1), (-1, -2))
    elif entry.field == "shift":  # (column, row) there
        array = array[:, ::-1].astype(np.float64) * units.pixels(entry.layer)[None]
    return array.astype(dtype)


def to_torch(entry: Entry, array: Array, dtype: np.dtype[Any], units: ShiftUnits) -> Array:
    """Turn our array into theirs; the way back of `from_torch`.

    Args:
        entry: The variable.
        array: Ours, ``entry.shape``.
        dtype: The type of the gates, which are floats there.
        units: Their units of shifts.

    Returns:
        A contiguous array of its own, of the shape `torch_shape`; bfloat16 as float32.
    """
    if entry.field == "kernel":
        array = np.moveaxis(array, (-1, -2), (0, 1))
    elif entry.field == "shift":
        # Along an axis of a single pixel a shift has no effect, and with align_corners no unit.
        pixels = units.pixels(entry.layer)
        unit = np.where(pixels > 0, 1 / np.where(pixels > 0, pixels, 1), 0)
        array = (array.astype(np.float64) * unit[None]).astype(array.dtype)[:, ::-1]
    elif entry.field == "source":
        array = array.astype(np.int64)
    elif entry.field == "gate":
        array = array.astype(dtype)
    if array.dtype == jnp.bfloat16:
        array = array.astype(np.float32)
    return np.array(array, order="C")
