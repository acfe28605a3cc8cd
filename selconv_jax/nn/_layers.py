"""Batch norm, ReLU, convolution: the selective layer and its plain twin, as Flax (Linen) modules."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype

from selconv_jax._utils.arguments import check_number, check_whole
from selconv_jax._xla.batch_norm import (
    Statistics,
    batch_norm,
    batch_norm_relu,
    batch_statistics,
    statistics_dtype,
    update_running_statistics,
)
from selconv_jax._xla.convolution import canonical_padding, canonical_window, convolve
from selconv_jax.errors import ConfigError
from selconv_jax.functional._groups import without_rows
from selconv_jax.functional._shift import select, select_with_statistics

__all__ = ["BatchNormReLU", "BatchNormReLUConv", "SelectiveConv", "check_capacity", "fan_out_normal"]

Array = jax.Array
Initializer = Callable[..., Any]
_Selected = tuple[Array, Array, Statistics | None]

# Normal with standard deviation sqrt(2 / (kh * kw * O)); method, "One selective layer".
fan_out_normal: Initializer = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class BatchNormReLUConv(nn.Module):
    """Batch norm, ReLU, dropout and convolution without bias: the plain twin of `SelectiveConv`.

    Variables, with ``C`` input channels: ``params`` kernel ``[*kernel_size, C / groups, features]``, scale
    ``[C]``, bias ``[C]`` (of the batch norm); ``batch_stats`` mean ``[C]``, var ``[C]``, float32 or wider.

    The running variance takes the unbiased estimate of the batch, the normalization the biased one.

    Attributes:
        features: Number of output channels ``O``.
        kernel_size: One size per spatial dimension; their number sets the rank of the input. A number
            stands for one dimension, as in `flax.linen.Conv`.
        strides: Steps of the window, one for all dimensions or one each; None: 1.
        padding: ``"SAME"``, ``"SAME_LOWER"``, ``"VALID"``, ``"CIRCULAR"``, ``"REFLECT"``, ``"CAUSAL"`` (one
            dimension), a number, or one number or ``(low, high)`` per dimension.
        kernel_dilation: Spacing of the kernel's taps, one for all dimensions or one each; None: 1.
        feature_group_count: Number of groups that input and output channels are split into.
        dropout_rate: Share of the activations that dropout removes in training; needs a ``dropout`` key.
        momentum: Share of the running statistics that survives a step.
        epsilon: Added to the variance.
        dtype: Type of the computation; None takes that of the input and parameters. Statistics are
            taken in float32 or wider.
        param_dtype: Type of the parameters.
        precision: Precision of the convolution, see `jax.lax.Precision`.
        kernel_init: Initializer of the kernel.
    """

    features: int
    kernel_size: int | Sequence[int]
    strides: int | Sequence[int] | None = 1
    padding: str | int | Sequence[int | tuple[int, int]] = "SAME"
    kernel_dilation: int | Sequence[int] | None = 1
    feature_group_count: int = 1
    dropout_rate: float = 0.0
    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Initializer = fan_out_normal

    def __post_init__(self) -> None:
        check_whole("features", self.features, 1)
        check_whole("feature_group_count", self.feature_group_count, 1)
        rank = len(self._window())
        canonical_window(self.strides, rank, "strides")
        canonical_padding(self.padding, rank)
        canonical_window(self.kernel_dilation, rank, "kernel_dilation")
        check_number("dropout_rate", self.dropout_rate, lambda share: 0.0 <= share < 1.0, "in [0, 1)")
        _check_normalization(self)
        if self.features % self.feature_group_count:
            raise ConfigError(
                f"features is {self.features}, not a multiple of feature_group_count "
                f"{self.feature_group_count}."
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, train: bool, statistics: Statistics | None = None) -> Array:
        """Apply the layer.

        Args:
            x: ``[N, *S, C]`` floating.
            train: Normalize with the statistics of the batch and move the running ones, for which
                ``batch_stats`` must be mutable; else normalize with the running ones.
            statistics: Those of ``x``, where they are known: `batch_statistics` of
                the parts that ``x`` is concatenated of, joined. In a dense network, where many layers read
                the same channels, they are then computed once. The result is the same, gradients included.
                Without effect unless ``train``.

        Returns:
            ``[N, *S', features]``.

        Raises:
            ValueError: The input does not have the rank that ``kernel_size`` asks for, its channels
                do not divide into the groups, the statistics are those of another number of channels, or
                ``train`` is traced.
            flax.errors.ModifyScopeVariableError: ``train``, and ``batch_stats`` is not mutable.
        """
        given: Any = train
        if isinstance(given, jax.core.Tracer):
            raise ValueError(
                f"{self.name or type(self).__name__}: train is traced, but it decides what is compiled. "
                "Pass it by position, with static_argnums=(2,) for nn.remat, in_axes=nn.broadcast for "
                "nn.scan, in_axes=(0, None) for nn.vmap; under jax.jit, make it a static argument."
            )
        channels = x.shape[-1]
        window = self._window()
        rank = len(window)
        if x.ndim != rank + 2:
            raise ValueError(
                f"{self.name or type(self).__name__}: input of shape {x.shape}, but kernel_size "
                f"{window} needs {rank + 2} dimensions: batch, {rank} spatial, channels."
            )
        if channels % self.feature_group_count:
            raise ValueError(
                f"{self.name or type(self).__name__}: {channels} input channels do not divide into "
                f"{self.feature_group_count} groups (feature_group_count)."
            )
        if statistics is not None and any(values.shape != (channels,) for values in statistics):
            shapes = ", ".join(str(values.shape) for values in statistics)
            raise ValueError(
                f"{self.name or type(self).__name__}: statistics of shapes {shapes}, but an input of shape "
                f"{x.shape} has a mean and a variance of shape {(channels,)}."
            )
        shape = (*window, channels // self.feature_group_count, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        x, kernel = promote_dtype(x, kernel, dtype=self.dtype)

        x, kernel, statistics = self._select(x, kernel, statistics if train else None)
        x = _batch_norm_relu(self, x, train, statistics)
        if self.dropout_rate > 0:
            x = nn.Dropout(self.dropout_rate)(x, deterministic=not train)
        return convolve(
            x,
            kernel,
            strides=canonical_window(self.strides, rank, "strides"),
            padding=canonical_padding(self.padding, rank),
            kernel_dilation=canonical_window(self.kernel_dilation, rank, "kernel_dilation"),
            groups=self.feature_group_count,
            precision=self.precision,
        )

    @nn.nowrap
    def _window(self) -> tuple[int, ...]:
        """The kernel size, one per spatial dimension."""
        size: Any = self.kernel_size
        sizes = tuple(size) if isinstance(size, Iterable) else (size,)
        return canonical_window(sizes, len(sizes), "kernel_size")

    @nn.nowrap
    def _select(self, x: Array, kernel: Array, statistics: Statistics | None) -> _Selected:
        """The input and the kernel as the layer sees them; the statistics, if they are known."""
        return x, kernel, statistics


class SelectiveConv(BatchNormReLUConv):
    """Selective convolution: channel selection, batch norm, ReLU, dropout, gate, convolution.

    Computes the forward pass of the method's "One selective layer". It never rewrites its allocation;
    `selconv_jax.reallocate` does, for all such layers of a model at once.

    Variables beside those of `BatchNormReLUConv`: ``selectivity`` gate ``[C]`` bool and source ``[C]`` int32
    (-1: the channel reads itself); ``params`` shift ``[C, len(kernel_size)]`` in pixels, row first. A
    gate-only layer has the gate alone: closed channels are never given away. How many channels compete for
    the slots is a setting of the round, not of the layer: `selconv_jax.AllocationRule.top_k`.

    Attributes:
        slots: Share of the channels that the compiled program provides for copies, in [0, 1]. The
            result is the same for any share that is large enough, the cost grows with it; at 0 the
            program is that of the plain layer. `selconv_jax.required_capacity` tells what a model needs. With
            more copies than that, a layer raises a `selconv_jax.ConfigError` where it knows them, and
            computes NaN where they are traced.
        gate_only: The layer closes channels and never copies any.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from selconv_jax import SelectiveConv
        >>> layer = SelectiveConv(features=8, kernel_size=(3, 3))
        >>> x = jnp.ones((2, 6, 6, 4))
        >>> variables = layer.init(jax.random.key(0), x, train=False)
        >>> y, changed = layer.apply(variables, x, train=True, mutable=["batch_stats"])
        >>> y.shape, sorted(variables["selectivity"])
        ((2, 6, 6, 8), ['gate', 'source'])
    """

    capacity: float = 1.0
    gate_only: bool = False

    def __post_init__(self) -> None:
        check_number(
            "capacity", self.capacity, lambda share: 0.0 <= share <= 1.0, "a share of the channels in [0, 1]"
        )
        super().__post_init__()

    @nn.nowrap
    def _select(self, x: Array, kernel: Array, statistics: Statistics | None) -> _Selected:
        channels = x.shape[-1]
        gate = self.variable("selectivity", "gate", jnp.ones, (channels,), jnp.bool_)
        kernel = without_rows(kernel, ~gate.value)
        if self.gate_only:
            return x, kernel, statistics
        source = self.variable("selectivity", "source", jnp.full, (channels,), -1, jnp.int32).value
        shift = self.param("shift", nn.initializers.zeros, (channels, x.ndim - 2), self.param_dtype)
        if not isinstance(source, jax.core.Tracer) and getattr(source, "is_fully_addressable", True):
            copies = int(np.count_nonzero(np.asarray(source) >= 0))
            check_capacity("/".join(self.path) or type(self).__name__, self.capacity, channels, copies)
        capacity = math.ceil(self.capacity * channels)
        if capacity == 0:
            # Copies without a slot make the sum NaN, where it costs nothing per pixel.
            return x, without_rows(kernel, source >= 0, jnp.nan), statistics
        if statistics is None:
            return select(x, source, shift, capacity), kernel, None
        x, statistics = select_with_statistics(x, statistics, source, shift, capacity)
        return x, kernel, statistics


def check_capacity(name: str, capacity: float, channels: int, copies: int) -> None:
    """Raise a `ConfigError` if a layer has more copies than its ``capacity`` provides for."""
    room = math.ceil(capacity * channels)
    if copies > room:
        raise ConfigError(
            f"layer {name!r}: capacity is {capacity}, which provides for {room} copies, but {copies} of its "
            f"{channels} channels are copies. Take model.clone(capacity=c) with c of at least "
            "selconv_jax.required_capacity(variables)."
        )


class BatchNormReLU(nn.Module):
    """Batch norm and ReLU alone, as at the end of a network; the same variables as in `BatchNormReLUConv`.

    Attributes:
        momentum: Share of the running statistics that survives a step.
        epsilon: Added to the variance.
        param_dtype: Type of the parameters.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        _check_normalization(self)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, train: bool, statistics: Statistics | None = None) -> Array:
        """Normalize ``[N, *S, C]`` and clip it at 0, see `BatchNormReLUConv.__call__`."""
        return _batch_norm_relu(self, x, train, statistics)


def _batch_norm_relu(
    module: BatchNormReLUConv | BatchNormReLU, x: Array, train: bool, statistics: Statistics | None
) -> Array:
    """Batch norm and ReLU with the variables of ``module``; moves the running ones in training."""
    channels = (x.shape[-1],)
    scale = module.param("scale", nn.initializers.ones, channels, module.param_dtype)
    bias = module.param("bias", nn.initializers.zeros, channels, module.param_dtype)
    dtype = statistics_dtype(module.param_dtype)
    running_mean = module.variable("batch_stats", "mean", jnp.zeros, channels, dtype)
    running_var = module.variable("batch_stats", "var", jnp.ones, channels, dtype)
    if not train:
        normalized = batch_norm(x, running_mean.value, running_var.value, scale, bias, module.epsilon)
        return nn.relu(normalized)
    mean, var = batch_statistics(x) if statistics is None else statistics
    if not module.is_initializing():
        running_mean.value, running_var.value = update_running_statistics(
            running_mean.value, running_var.value, mean, var, x.size // x.shape[-1], module.momentum
        )
    return batch_norm_relu(x, mean, var, scale, bias, module.epsilon)


def _check_normalization(module: BatchNormReLUConv | BatchNormReLU) -> None:
    check_number("momentum", module.momentum, lambda share: 0.0 <= share <= 1.0, "in [0, 1]")
    check_number(
        "epsilon", module.epsilon, lambda value: 0.0 <= value < math.inf, "a finite number, at least 0"
    )
