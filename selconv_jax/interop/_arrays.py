"""Conversion of single arrays between PyTorch's layout, dtype and units and ours."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from selconv_jax.errors import ConfigError
from selconv_jax.interop._names import Entry

Array = NDArray[Any]
Path = tuple[str, ...]
Units = Mapping[Path, NDArray[np.float64]]  # pixels per unit of shift [2], by the path of the layer


def shift_units(sizes: Mapping[Path, tuple[int, int]], align_corners: bool) -> Units:
    """Return the pixels (rows, columns) per unit of the authors' shifts, given ``(H, W)`` of layers' inputs.

    The authors add ``4 / (H + W)`` times the shift to coordinates from -1 to 1 across the layer's input of
    ``H`` rows by ``W`` columns (method, "What is exact, and what deviates"). With
    ``align_corners=False`` this range spans ``H`` pixels, so that a unit is ``2 H / (H + W)`` rows and
    ``2 W / (H + W)`` columns: one pixel if the input is square. With ``align_corners=True`` it spans
    ``H - 1`` pixels, and a unit is ``2 (H - 1) / (H + W)`` rows.

    Example:
        >>> shift_units({("conv1",): (8, 24)}, align_corners=False)
        {('conv1',): array([0.5, 1.5])}
    """
    lost = 1 if align_corners else 0
    return {layer: 2 * (np.array(size, np.float64) - lost) / sum(size) for layer, size in sizes.items()}


def torch_shape(entry: Entry) -> tuple[int, ...]:
    """Return the shape of PyTorch's array: kernels are ``[O, I, *K]`` there, and ``[*K, I, O]`` here."""
    if entry.field == "kernel":
        # The last layer of timm's `resnetv2` is a convolution.
        window = (1, 1) if entry.name == "head.fc.weight" else entry.shape[:-2]
        return (entry.shape[-1], entry.shape[-2], *window)
    return entry.shape


def to_numpy(value: Any) -> Array:
    """Convert an array of NumPy or JAX, or a tensor of PyTorch, to a NumPy array."""
    if hasattr(value, "detach"):  # a tensor, perhaps on an accelerator
        value = value.detach().cpu()
        if value.is_floating_point() and value.element_size() < 4:  # NumPy lacks some of these types
            value = value.float()
    return np.asarray(value)


def find_fault(entry: Entry, array: Array, dtype: np.dtype[Any]) -> str | None:
    """Describe a value of the authors' array that the variable cannot have in ``dtype``; None: no fault."""
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


def from_torch(entry: Entry, array: Array, dtype: np.dtype[Any], units: Units) -> Array:
    """Convert the authors' array, without faults, to ours, of ``entry.shape``."""
    if entry.field == "kernel":
        array = array.reshape(*array.shape[:2], *entry.shape[:-2])
        array = np.moveaxis(array, (0, 1), (-1, -2))
    elif entry.field == "shift":  # (column, row) there
        array = array[:, ::-1].astype(np.float64) * units[entry.layer][None]
    return array.astype(dtype)


def to_torch(entry: Entry, array: Array, dtype: np.dtype[Any], units: Units) -> Array:
    """Convert our array to a contiguous one of the authors'; bfloat16 to float32, gates to ``dtype``."""
    if entry.field == "kernel":
        array = np.moveaxis(array, (-1, -2), (0, 1)).reshape(torch_shape(entry))
    elif entry.field == "shift":
        # Along an axis of a single pixel a shift has no effect, and with align_corners its unit is 0.
        pixels = units[entry.layer]
        unit = np.where(pixels > 0, 1 / np.where(pixels > 0, pixels, 1), 0)
        array = (array.astype(np.float64) * unit[None]).astype(array.dtype)[:, ::-1]
    elif entry.field == "source":
        array = array.astype(np.int64)
    elif entry.field == "gate":
        array = array.astype(dtype)
    if array.dtype == jnp.bfloat16:
        array = array.astype(np.float32)
    return np.array(array, order="C")


def without_allocation(variables: Mapping[Path, Array], owner: str) -> dict[Path, Array]:
    """Set the weights of closed channels to 0, so that they may be open in a network of ``owner``.

    Raises:
        ConfigError: Channels are copied.
    """
    result = dict(variables)
    for path, gate in variables.items():
        layer = path[1:-1]
        source = variables.get(("selectivity", *layer, "source"))
        if path[-1] != "gate":
            continue
        if source is not None and (copies := np.count_nonzero(source >= 0)):
            raise ConfigError(
                f"{'/'.join(layer)} has {copies} copied channels, which {owner} do not have: export the "
                "function instead (selconv_jax.export)."
            )
        kernel = variables["params", *layer, "kernel"]
        result["params", *layer, "kernel"] = np.where(gate[:, None], kernel, np.zeros((), kernel.dtype))
    return result
