"""Computation of the layers on plain arrays, shared by their Linen and NNX modules."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.initializers import variance_scaling
from flax.typing import Initializer, PrecisionLike

from selconv_jax._utils.arguments import check_dtype, check_number, check_whole
from selconv_jax._xla.batch_norm import (
    AxisName,
    Statistics,
    batch_norm,
    batch_norm_relu,
    batch_statistics,
    update_running_statistics,
)
from selconv_jax._xla.convolution import canonical_padding, canonical_window, convolve
from selconv_jax.errors import ConfigError
from selconv_jax.functional._groups import without_rows
from selconv_jax.functional._select import select, select_with_statistics

Array = jax.Array

# Normal with standard deviation sqrt(2 / (kh * kw * O)); method, "One selective layer".
fan_out_normal: Initializer = variance_scaling(2.0, "fan_out", "normal")


class NormSettings(Protocol):
    """Attributes of a layer with batch norm, see `selconv_jax.nn.BatchNormReLUConv`."""

    momentum: float
    epsilon: float


class ConvSettings(NormSettings, Protocol):
    """Attributes of a layer with a convolution, likewise."""

    kernel_size: int | Sequence[int]
    strides: int | Sequence[int] | None
    padding: str | int | Sequence[int | tuple[int, int]]
    kernel_dilation: int | Sequence[int] | None
    feature_group_count: int
    dropout_rate: float
    precision: PrecisionLike


class Selected(NamedTuple):
    """Input, kernel and known statistics that batch norm and convolution compute with."""

    x: Array
    kernel: Array
    statistics: Statistics | None


def check_norm_settings(layer: NormSettings) -> None:
    """Raise a `ConfigError` unless the settings of the batch norm are within their bounds."""
    check_number("momentum", layer.momentum, lambda share: 0.0 <= share <= 1.0, "in [0, 1]")
    check_number(
        "epsilon", layer.epsilon, lambda value: 0.0 <= value < math.inf, "a finite number, at least 0"
    )


def check_conv_settings(layer: ConvSettings, features: int) -> None:
    """Raise a `ConfigError` unless the settings of a layer with ``features`` outputs are in bounds."""
    check_whole("features", features, 1)
    check_whole("feature_group_count", layer.feature_group_count, 1)
    rank = len(window_of(layer))
    canonical_window(layer.strides, rank, "strides")
    canonical_padding(layer.padding, rank)
    canonical_window(layer.kernel_dilation, rank, "kernel_dilation")
    check_number("dropout_rate", layer.dropout_rate, lambda share: 0.0 <= share < 1.0, "in [0, 1)")
    check_norm_settings(layer)
    if features % layer.feature_group_count:
        raise ConfigError(
            f"features is {features}, not a multiple of feature_group_count {layer.feature_group_count}."
        )


def check_capacity(capacity: float) -> None:
    """Raise a `ConfigError` unless a capacity is a fraction."""
    check_number(
        "capacity", capacity, lambda share: 0.0 <= share <= 1.0, "a fraction of the channels in [0, 1]"
    )


def window_of(layer: ConvSettings) -> tuple[int, ...]:
    """Return the kernel size, one per spatial dimension."""
    size: Any = layer.kernel_size
    sizes = tuple(size) if isinstance(size, Iterable) else (size,)
    return canonical_window(sizes, len(sizes), "kernel_size")


def check_inputs(layer: ConvSettings, name: str, x: Array, statistics: Statistics | None) -> None:
    """Raise a ValueError unless an input ``[N, *S, C]`` and its statistics ``[C]`` fit the layer."""
    window, channels = window_of(layer), x.shape[-1]
    rank = len(window)
    if x.ndim != rank + 2:
        raise ValueError(
            f"{name}: input of shape {x.shape}, but kernel_size {window} needs {rank + 2} dimensions: "
            f"batch, {rank} spatial, channels."
        )
    if channels % layer.feature_group_count:
        raise ValueError(
            f"{name}: {channels} input channels do not divide into {layer.feature_group_count} groups "
            "(feature_group_count)."
        )
    if statistics is not None and any(values.shape != (channels,) for values in statistics):
        shapes = ", ".join(str(values.shape) for values in statistics)
        raise ValueError(
            f"{name}: statistics of shapes {shapes}, but an input of shape {x.shape} has a mean and a "
            f"variance of shape {(channels,)}."
        )


def select_channels(
    inputs: Selected,
    gate: Array,
    source: Array | None,
    shift: Array | None,
    capacity: float,
    *,
    name: str,
    axis_name: AxisName = None,
) -> Selected:
    """Select the channels of the input, and close rows of the kernel (method, "One selective layer").

    Args:
        inputs: Input ``[N, *S, C]``, kernel, and statistics if they are known.
        gate: ``[C]`` bool.
        source: ``[C]`` int32, -1 where a channel reads itself; None in a gate-only layer.
        shift: ``[C, len(S)]`` in pixels, with ``source``.
        capacity: Copies that the program provides for, as a fraction of the channels.
        name: Name of the layer in messages.
        axis_name: Mapped axis over which statistics are computed.

    Returns:
        What batch norm and convolution compute with.

    Raises:
        ConfigError: The sources are concrete, and more than the capacity provides for.
        ValueError: The gate is not boolean, or the sources are not integers.
    """
    x, kernel, statistics = inputs
    # The complement of an integer 1 is -2, which would close the channel.
    check_dtype(f"{name}: gate", gate, np.bool_, "bool")
    kernel = without_rows(kernel, ~gate)
    if source is None or shift is None:
        return Selected(x, kernel, statistics)
    check_dtype(f"{name}: source", source, np.integer, "integer")
    channels = x.shape[-1]
    if not isinstance(source, jax.core.Tracer) and getattr(source, "is_fully_addressable", True):
        check_copies(name, capacity, channels, int(np.count_nonzero(np.asarray(source) >= 0)))
    copy_limit = math.ceil(capacity * channels)
    if copy_limit == 0:
        # Copies without capacity make the output NaN through the kernel, at no cost per pixel.
        return Selected(x, without_rows(kernel, source >= 0, jnp.nan), statistics)
    if statistics is None:
        return Selected(select(x, source, shift, copy_limit), kernel, None)
    x, statistics = select_with_statistics(x, statistics, source, shift, copy_limit, axis_name)
    return Selected(x, kernel, statistics)


def check_copies(name: str, capacity: float, channels: int, copies: int) -> None:
    """Raise a `ConfigError` if a layer has more copies than its ``capacity`` provides for."""
    room = math.ceil(capacity * channels)
    if copies > room:
        raise ConfigError(
            f"layer {name!r}: capacity is {capacity}, which provides for {room} copies, but {copies} of its "
            f"{channels} channels are copies. Take model.clone(capacity=c) with c of at least "
            "selconv_jax.required_capacity(variables)."
        )


def norm_relu(
    layer: NormSettings,
    x: Array,
    scale: Array,
    bias: Array,
    running: Statistics,
    train: bool,
    statistics: Statistics | None = None,
    axis_name: AxisName = None,
) -> tuple[Array, Statistics]:
    """Apply batch norm and ReLU.

    Args:
        layer: Settings of the batch norm.
        x: ``[N, *S, C]``.
        scale: ``[C]``.
        bias: ``[C]``.
        running: Running mean and variance.
        train: Normalize with the statistics of the batch; otherwise with the running ones.
        statistics: Those of the batch, if they are known.
        axis_name: Mapped axis over which they are computed.

    Returns:
        ``[N, *S, C]``, and the running statistics after the batch (unchanged unless ``train``).
    """
    if not train:
        return jax.nn.relu(batch_norm(x, *running, scale, bias, layer.epsilon)), running
    batch = batch_statistics(x, axis_name) if statistics is None else statistics
    count = x.size // x.shape[-1]
    if axis_name is not None:
        count *= jax.lax.psum(1, axis_name)
    new = update_running_statistics(*running, *batch, count, layer.momentum)
    return batch_norm_relu(x, *batch, scale, bias, layer.epsilon), Statistics(*new)


def apply_convolution(layer: ConvSettings, x: Array, kernel: Array) -> Array:
    """Convolve ``[N, *S, C]`` with a kernel ``[*kernel_size, C / groups, O]``; returns ``[N, *S', O]``."""
    rank = x.ndim - 2
    return convolve(
        x,
        kernel,
        strides=canonical_window(layer.strides, rank, "strides"),
        padding=canonical_padding(layer.padding, rank),
        kernel_dilation=canonical_window(layer.kernel_dilation, rank, "kernel_dilation"),
        groups=layer.feature_group_count,
        precision=layer.precision,
    )
