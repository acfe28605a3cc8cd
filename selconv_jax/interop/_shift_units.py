"""The authors' unit of shifts, whose size in pixels depends on each layer's input."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from numpy.typing import NDArray

from selconv_jax.errors import ConfigError
from selconv_jax.nn._layers import SelectiveConv

__all__ = ["ShiftUnits", "init_shapes"]

Path = tuple[str, ...]


def init_shapes(
    model: nn.Module, image_shape: tuple[int, int, int]
) -> tuple[Any, dict[Path, tuple[int, int]]]:
    """Infer the shapes of a network's variables and of the inputs of its selective layers.

    Args:
        model: A network with ``param_dtype``, called as ``model.apply(variables, images, train=...)``.
        image_shape: ``(H, W, C)``.

    Returns:
        The variables as `jax.ShapeDtypeStruct`, and ``(H, W)`` of the input of every `SelectiveConv` by
        layer path. Nothing is computed.
    """
    sizes: dict[Path, tuple[int, int]] = {}

    def record(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if isinstance(context.module, SelectiveConv) and context.method_name == "__call__":
            sizes[context.module.path] = args[0].shape[1:3]
        return call(*args, **kwargs)

    image = jax.ShapeDtypeStruct((1, *image_shape), model.param_dtype)
    with nn.intercept_methods(record):
        shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), image)
    return shapes, sizes


class ShiftUnits:
    """Pixels per unit of the authors' shifts, by layer and axis.

    The authors add ``4 / (H + W)`` times the shift to coordinates from -1 to 1 across the layer's input of
    ``H`` rows by ``W`` columns (method, "Known deviations"). With ``align_corners=False`` this range spans
    ``H`` pixels, so that a unit is ``2 H / (H + W)`` rows and ``2 W / (H + W)`` columns: one pixel if the
    input is square. With ``align_corners=True`` it spans ``H - 1`` pixels, and a unit is
    ``2 (H - 1) / (H + W)`` rows.

    Args:
        sizes: ``(H, W)`` of each layer's input; None: all are square.
        align_corners: Whether the ends of the range are the centres of the corner pixels, not their edges.

    Raises:
        ConfigError: ``align_corners`` is set without sizes.

    Example:
        >>> units = ShiftUnits({("conv1",): (8, 24)}, align_corners=False)
        >>> units.pixels(("conv1",)).tolist()
        [0.5, 1.5]
    """

    def __init__(self, sizes: Mapping[Path, tuple[int, int]] | None, align_corners: bool) -> None:
        if sizes is None and align_corners:
            raise ConfigError(
                "align_corners is True, which needs image_shape: give the (H, W, C) of the images."
            )
        self._sizes = sizes
        self._lost = 1 if align_corners else 0

    def pixels(self, layer: Path) -> NDArray[np.float64]:
        """Return the pixels per unit of a layer, ``[2]`` (rows, columns)."""
        if self._sizes is None:
            return np.ones(2)
        size = np.asarray(self._sizes[layer], np.float64)
        return 2 * (size - self._lost) / size.sum()
