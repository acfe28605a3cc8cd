"""A selective layer whose allocation is fixed: it holds only what it reads, under its usual names."""

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
from selconv_jax.nn._layers import BatchNormReLUConv

__all__ = ["StaticConv", "call_static", "output_shape"]

Array = jax.Array


class StaticConv(BatchNormReLUConv):
    """Reads the channels of its layout, then batch norm, ReLU, dropout and convolution of just these.

    Variables, with ``R`` channels that are read: ``params`` kernel ``[*kernel_size, R / groups, features]``,
    scale ``[R]``, bias ``[R]`` and, where there are copies, shift ``[copies, len(kernel_size)]`` in pixels;
    ``batch_stats`` mean ``[R]``, var ``[R]``. There is no ``selectivity``.

    Attributes:
        layout: What the layer reads; ``features`` and ``feature_group_count`` are those of the layout.

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
    def __call__(self, x: Array, train: bool, statistics: Statistics | None = None) -> Array:
        """Apply the layer, see `BatchNormReLUConv.__call__`.

        Args:
            x: ``[N, *S, layout.inputs]`` floating.
            train: See `BatchNormReLUConv`.
            statistics: Those of ``x``, where they are known, see `BatchNormReLUConv`.

        Returns:
            ``[N, *S', features]``.

        Raises:
            ValueError: The input has another number of channels than the layout.
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
        arrange = _in_place if layout.is_in_place else _gathered
        x, statistics = arrange(x, layout, shift, statistics if train else None)
        return super().__call__(x, train, statistics)

    @property
    def _layout(self) -> LayerLayout:
        if self.layout is None:
            raise ValueError("a StaticConv needs a layout; selconv_jax.compact makes such layers.")
        return self.layout

    @nn.nowrap
    def _select(
        self, x: Array, kernel: Array, statistics: Statistics | None
    ) -> tuple[Array, Array, Statistics | None]:
        """All of the input, whose idle channels have their kernel rows held at zero."""
        if not self._layout.idle:
            return x, kernel, statistics
        idle = np.zeros(self._layout.reads, bool)
        idle[list(self._layout.idle)] = True
        return x, without_rows(kernel, jnp.asarray(idle)), statistics


def _in_place(
    x: Array, layout: LayerLayout, shift: Array | None, statistics: Statistics | None
) -> tuple[Array, Statistics | None]:
    """The input with the copies in the places of channels that are not read; its statistics, if known."""
    assert shift is not None
    order = layout.order or tuple(range(layout.reads))
    places = tuple(order.index(len(layout.own) + number) for number in range(len(layout.copied)))
    source = np.full(layout.inputs, -1, np.int32)
    source[list(places)] = layout.copied
    shift = spread_channels(shift, places, layout.inputs, axis=0)
    if statistics is None:
        return select(x, jnp.asarray(source), shift, len(places)), None
    return select_with_statistics(x, statistics, jnp.asarray(source), shift, len(places))


def _gathered(
    x: Array, layout: LayerLayout, shift: Array | None, statistics: Statistics | None
) -> tuple[Array, Statistics | None]:
    """Just what is read of the input; its statistics, if known."""
    parts, known = [], []
    if layout.own:
        parts.append(take_channels(x, layout.own))
        if statistics is not None:
            known.append(Statistics(*(take_channels(values, layout.own) for values in statistics)))
    if shift is not None:
        parts.append(channel_shift(take_repeated(x, layout.copied), shift))
        if statistics is not None:
            known.append(batch_statistics(parts[-1]))
    x = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)
    statistics = join_statistics(*known) if known else None
    if not layout.order:
        return x, statistics
    if statistics is not None:
        statistics = Statistics(*(take_channels(values, layout.order) for values in statistics))
    return take_channels(x, layout.order), statistics


def call_static(
    layer: BatchNormReLUConv, layout: LayerLayout, x: Array, train: bool, statistics: Statistics | None = None
) -> Array:
    """What a layer of a network computes with a fixed allocation, with variables in the same place.

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
    """The shape ``[N, *S', features]`` of a layer's output for an input ``[N, *S, C]``."""
    window = layer._window()
    if len(x.shape) != len(window) + 2:
        raise ValueError(
            f"{layer.name or type(layer).__name__}: input of shape {x.shape}, but kernel_size {window} needs "
            f"{len(window) + 2} dimensions: batch, {len(window)} spatial, channels."
        )
    # The channels do not matter to the other dimensions; one is enough, also where none is left.
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
    """The input in the type that the layer computes in."""
    return promote_dtype(x, jnp.zeros((), layer.param_dtype), dtype=layer.dtype)[0]
