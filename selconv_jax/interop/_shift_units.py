"""The authors' unit of the shift in pixels, which depends on the size of each layer's input."""

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
    """Shapes of a network's variables and of the images that its selective layers read.

    Args:
        model: A network, called as ``model.apply(variables, images, train=...)``, with ``param_dtype``.
        image_shape: ``(H, W, C)``.

    Returns:
        The variables as `jax.ShapeDtypeStruct`, and ``(H, W)`` of the input of every `SelectiveConv` by the
        path of the layer. Nothing is computed.
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
    """How many pixels the authors' unit of a shift is, per layer and axis.

    They add ``4 / (H + W)`` times the shift to coordinates that go from -1 to 1 across the layer's input,
    ``H`` rows by ``W`` columns (method, "Known deviations"). With ``align_corners=False`` that range
    spans ``H`` pixels, so that a unit is ``2 H / (H + W)`` rows and ``2 W / (H + W)`` columns: one pixel
    where the input is square. With ``align_corners=True`` it spans ``H - 1`` pixels, and a unit is
    ``2 (H - 1) / (H + W)`` rows.

    Args:
        sizes: ``(H, W)`` of the input of each layer; None: all are square.
        align_corners: What the sampling of their program meant by the ends of the range.

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
        """Pixels per unit, ``[2]`` (rows, columns), of the layer at a path."""
        if self._sizes is None:
            return np.ones(2)
        size = np.asarray(self._sizes[layer], np.float64)
        return 2 * (size - self._lost) / size.sum()
