"""Static layers: selective layers with a fixed allocation and only the variables that it needs."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype

from selconv_jax._xla.batch_norm import Statistics, batch_statistics, join_statistics
from selconv_jax._xla.convolution import canonical_padding, canonical_window, convolve
from selconv_jax.compaction._gather import spread_channels, take_channels, take_repeated
from selconv_jax.compaction._layout import LayerLayout
from selconv_jax.functional._groups import without_rows
from selconv_jax.functional._shift import channel_shift, select, select_with_statistics
from selconv_jax.nn._computation import Selected, window_of
from selconv_jax.nn._layers import BatchNormReLUConv

__all__ = ["StaticConv", "call_static", "output_shape"]

Array = jax.Array


class StaticConv(BatchNormReLUConv):
    """Selective layer with a fixed allocation: batch norm, ReLU, dropout and convolution of what it reads.

    Variables, with ``R`` channels read: ``params`` kernel ``[*kernel_size, R / groups, features]``, scale
    ``[R]``, bias ``[R]`` and, if there are copies, shift ``[copies, len(kernel_size)]`` in pixels;
    ``batch_stats`` mean ``[R]``, var ``[R]``. There is no ``selectivity``.

    Attributes:
        layout: The allocation; ``features`` and ``feature_group_count`` must be those of the layout.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layout = LayerLayout(inputs=6, own=(0, 1, 4), copied=(4,), outputs=8)
        >>> layer = StaticConv(features=8, kernel_size=(3, 3), layout=layout)
        >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 5, 5, 6)), train=False)
        >>> variables["params"]["kernel"].shape, variables["params"]["shift"].shape
        ((3, 3, 4, 8), (1, 2))
    """

    layout: LayerLayout | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool | None = None, statistics: Statistics | None = None) -> Array:
        """Apply the layer, see `BatchNormReLUConv.__call__`.

        Args:
            x: ``[N, *S, layout.inputs]`` floating.
            train: See `BatchNormReLUConv`.
            statistics: Statistics of ``x`` if they are known, see `BatchNormReLUConv`.

        Returns:
            ``[N, *S', features]``.

        Raises:
            ValueError: The number of input channels is not that of the layout.
        """
        layout = self._layout
        if x.shape[-1] != layout.inputs:
            raise ValueError(
                f"{self.name or type(self).__name__}: input of shape {x.shape}, but the layer was compacted "
                f"for {layout.inputs} input channels."
            )
        x = _promoted(self, x)
        shift = None
        if layout.copied:
            shape = (len(layout.copied), x.ndim - 2)
            shift = self.param("shift", nn.initializers.zeros, shape, self.param_dtype)
        is_training = self.train if train is None else train
        axis_name = None if self.is_initializing() else self.axis_name
        arrange = _in_place if layout.is_in_place else _gathered
        x, statistics = arrange(x, layout, shift, statistics if is_training else None, axis_name)
        return super().__call__(x, train, statistics)

    @property
    def _layout(self) -> LayerLayout:
        if self.layout is None:
            raise ValueError("a StaticConv needs a layout; selconv_jax.compact creates such layers.")
        return self.layout

    @nn.nowrap
    def _select(self, inputs: Selected) -> Selected:
        """Return all of the input, and the kernel with the rows of idle channels held at zero."""
        if not self._layout.idle:
            return inputs
        idle = np.zeros(self._layout.reads, bool)
        idle[list(self._layout.idle)] = True
        return inputs._replace(kernel=without_rows(inputs.kernel, jnp.asarray(idle)))


def _in_place(
    x: Array, layout: LayerLayout, shift: Array | None, statistics: Statistics | None, axis_name: Any
) -> tuple[Array, Statistics | None]:
    """Write the copies into the places of channels that are not read; return the statistics if known."""
    assert shift is not None
    order = layout.order or tuple(range(layout.reads))
    places = tuple(order.index(len(layout.own) + number) for number in range(len(layout.copied)))
    source = np.full(layout.inputs, -1, np.int32)
    source[list(places)] = layout.copied
    shift = spread_channels(shift, places, layout.inputs, axis=0)
    if statistics is None:
        return select(x, jnp.asarray(source), shift, len(places)), None
    return select_with_statistics(x, statistics, jnp.asarray(source), shift, len(places), axis_name)


def _gathered(
    x: Array, layout: LayerLayout, shift: Array | None, statistics: Statistics | None, axis_name: Any
) -> tuple[Array, Statistics | None]:
    """Gather the channels that are read; return their statistics if known."""
    parts, known = [], []
    if layout.own:
        parts.append(take_channels(x, layout.own))
        if statistics is not None:
            known.append(Statistics(*(take_channels(values, layout.own) for values in statistics)))
    if shift is not None:
        parts.append(channel_shift(take_repeated(x, layout.copied), shift))
        if statistics is not None:
            known.append(batch_statistics(parts[-1], axis_name))
    x = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)
    statistics = join_statistics(*known) if known else None
    if not layout.order:
        return x, statistics
    if statistics is not None:
        statistics = Statistics(*(take_channels(values, layout.order) for values in statistics))
    return take_channels(x, layout.order), statistics


def call_static(
    layer: BatchNormReLUConv,
    layout: LayerLayout,
    x: Array,
    train: bool | None = None,
    statistics: Statistics | None = None,
) -> Array:
    """Call a layer with a fixed allocation, with its variables in the same scope.

    Args:
        layer: The layer, bound.
        layout: Its layout.
        x: ``[N, *S, layout.inputs]``.
        train: See `BatchNormReLUConv`.
        statistics: See `BatchNormReLUConv`.

    Returns:
        ``[N, *S', layout.outputs]``.
    """
    if layout.outputs == 0:
        return jnp.zeros((*output_shape(layer, x)[:-1], 0), _promoted(layer, x).dtype)
    arguments: dict[str, Any] = {
        field.name: getattr(layer, field.name)
        for field in dataclasses.fields(BatchNormReLUConv)
        if field.name not in ("name", "parent")
    }
    arguments |= {"features": layout.outputs, "feature_group_count": layout.groups, "layout": layout}
    arguments |= {"name": layer.name, "parent": layer.scope}
    return StaticConv(**arguments)(x, train, statistics)


def output_shape(layer: BatchNormReLUConv, x: Any) -> tuple[int, ...]:
    """Return the shape ``[N, *S', features]`` of a layer's output for an input ``[N, *S, C]``."""
    window = window_of(layer)
    if len(x.shape) != len(window) + 2:
        raise ValueError(
            f"{layer.name or type(layer).__name__}: input of shape {x.shape}, but kernel_size {window} needs "
            f"{len(window) + 2} dimensions: batch, {len(window)} spatial, channels."
        )
    # The other dimensions do not depend on the channels: one channel serves also where none is left.
    one = jax.ShapeDtypeStruct((*x.shape[:-1], 1), jnp.float32)
    kernel = jax.ShapeDtypeStruct((*window, 1, 1), jnp.float32)

    def apply(x: Array, kernel: Array) -> Array:
        return convolve(
            x,
            kernel,
            strides=canonical_window(layer.strides, len(window), "strides"),
            padding=canonical_padding(layer.padding, len(window)),
            kernel_dilation=canonical_window(layer.kernel_dilation, len(window), "kernel_dilation"),
        )

    return (*jax.eval_shape(apply, one, kernel).shape[:-1], layer.features)


def _promoted(layer: BatchNormReLUConv, x: Array) -> Array:
    """Cast the input to the type of the layer's computation."""
    return promote_dtype(x, jnp.zeros((), layer.param_dtype), dtype=layer.dtype)[0]
