"""The selective layer and its plain twin as Flax NNX modules."""

import contextlib
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype, Initializer, PrecisionLike

from selconv_jax._xla.batch_norm import AxisName, Statistics, statistics_dtype
from selconv_jax.errors import ConfigError
from selconv_jax.nn import _computation as computation
from selconv_jax.nn._computation import Selected, fan_out_normal, window_of

Array = jax.Array


class Selectivity(nnx.Variable[Array]):
    """Allocation of a selective layer: its gate or its sources, which only `reallocate` changes."""


with contextlib.suppress(ValueError):  # where Flax's bridge has been used before, it keeps its own type
    nnx.register_variable_name("selectivity", Selectivity)


class BatchNormReLUConv(nnx.Module):
    """Batch norm, ReLU, dropout and convolution without bias: the plain twin of `SelectiveConv`.

    The NNX form of `selconv_jax.nn.BatchNormReLUConv`: the same variables and the same computation.

    Variables, with ``C`` input channels: `flax.nnx.Param` kernel ``[*kernel_size, C / groups, O]``, scale
    ``[C]``, bias ``[C]`` (of the batch norm); `flax.nnx.BatchStat` mean ``[C]``, var ``[C]``, float32 or
    wider.

    Args:
        in_features: Number of input channels ``C``.
        out_features: Number of output channels ``O``.
        kernel_size: One size per spatial dimension; an integer means one dimension.
        strides: See `selconv_jax.nn.BatchNormReLUConv`, also for the arguments below.
        padding: Likewise.
        kernel_dilation: Likewise.
        feature_group_count: Likewise.
        dropout_rate: Likewise; takes its keys from the stream ``dropout`` of ``rngs``.
        momentum: Likewise.
        epsilon: Likewise.
        axis_name: Likewise.
        use_running_average: Normalize with the running statistics, and compute without dropout, in calls that
            do not pass it; ``module.train()`` and ``module.eval()`` set it, as in `flax.nnx.BatchNorm`.
        dtype: Type of the computation; None: inferred from the input and parameters.
        param_dtype: Type of the parameters.
        precision: Precision of the convolution, see `jax.lax.Precision`.
        kernel_init: Initializer of the kernel; `flax.nnx.with_partitioning` annotates its sharding.
        rngs: Random number generators, with streams ``params`` and, for dropout, ``dropout``.

    Raises:
        ConfigError: An argument is out of bounds.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import selconv_jax
        >>> layer = selconv_jax.nnx.BatchNormReLUConv(4, 8, (3, 3), strides=2, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 6, 6, 4))).shape, layer.kernel.shape
        ((2, 3, 3, 8), (3, 3, 4, 8))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        *,
        strides: int | Sequence[int] | None = 1,
        padding: str | int | Sequence[int | tuple[int, int]] = "SAME",
        kernel_dilation: int | Sequence[int] | None = 1,
        feature_group_count: int = 1,
        dropout_rate: float = 0.0,
        momentum: float = 0.9,
        epsilon: float = 1e-5,
        axis_name: AxisName = None,
        use_running_average: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = fan_out_normal,
        rngs: nnx.Rngs,
    ) -> None:
        self.in_features = in_features
        self.out_features = out_features
        self.kernel_size: int | Sequence[int] = (
            tuple(kernel_size) if isinstance(kernel_size, Iterable) else kernel_size
        )
        self.strides = strides
        self.padding = padding
        self.kernel_dilation = kernel_dilation
        self.feature_group_count = feature_group_count
        self.dropout_rate = dropout_rate
        self.momentum = momentum
        self.epsilon = epsilon
        self.axis_name = axis_name
        self.use_running_average = use_running_average
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        computation.check_conv_settings(self, out_features)
        if in_features % feature_group_count:
            raise ConfigError(
                f"in_features is {in_features}, not a multiple of feature_group_count {feature_group_count}."
            )
        window, channels = window_of(self), (in_features,)
        shape = (*window, in_features // feature_group_count, out_features)
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape, param_dtype))
        self.scale = nnx.Param(jnp.ones(channels, param_dtype))
        self.bias = nnx.Param(jnp.zeros(channels, param_dtype))
        self.mean = nnx.BatchStat(jnp.zeros(channels, statistics_dtype(param_dtype)))
        self.var = nnx.BatchStat(jnp.ones(channels, statistics_dtype(param_dtype)))
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs) if dropout_rate > 0 else None

    def __call__(
        self,
        x: Array,
        use_running_average: bool | None = None,
        *,
        statistics: Statistics | None = None,
        deterministic: bool | None = None,
    ) -> Array:
        """Apply the layer.

        Args:
            x: ``[N, *S, C]`` floating.
            use_running_average: Normalize with the running statistics. Otherwise normalize with those of
                the batch, and update the running ones. None: the attribute.
            statistics: Statistics of ``x`` if they are known, see `selconv_jax.nn.BatchNormReLUConv`.
            deterministic: Compute without dropout; None: if with the running statistics.

        Returns:
            ``[N, *S', O]``.

        Raises:
            ValueError: The shape of the input, or of its statistics, does not fit the layer.
        """
        name = type(self).__name__
        train = not (self.use_running_average if use_running_average is None else use_running_average)
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(f"{name}: input of shape {x.shape}, but in_features is {self.in_features}.")
        computation.check_inputs(self, name, x, statistics)
        x, kernel = promote_dtype(x, self.kernel[...], dtype=self.dtype)
        x, kernel, statistics = self._select(Selected(x, kernel, statistics if train else None))
        running = Statistics(self.mean[...], self.var[...])
        x, new = computation.norm_relu(
            self, x, self.scale[...], self.bias[...], running, train, statistics, self.axis_name
        )
        if train:
            self.mean[...], self.var[...] = new
        if self.dropout is not None:
            x = self.dropout(x, deterministic=not train if deterministic is None else deterministic)
        return computation.apply_convolution(self, x, kernel)

    def _select(self, inputs: Selected) -> Selected:
        """Return the input, kernel and known statistics to compute with; a hook for subclasses."""
        return inputs


class SelectiveConv(BatchNormReLUConv):
    """Selective convolution: channel selection, batch norm, ReLU, dropout, gate, convolution.

    The NNX form of `selconv_jax.nn.SelectiveConv`: the same variables and the same computation.

    Variables beyond those of `BatchNormReLUConv`: `Selectivity` gate ``[C]`` bool and source ``[C]`` int32
    (-1: the channel reads itself); `flax.nnx.Param` shift ``[C, len(kernel_size)]`` in pixels, row first. A
    gate-only layer has the gate alone.

    Args:
        in_features: Number of input channels ``C``.
        out_features: Number of output channels ``O``.
        kernel_size: One size per spatial dimension; an integer means one dimension.
        capacity: Copies that the compiled program provides for, as a fraction of the channels in [0, 1], see
            `selconv_jax.nn.SelectiveConv`; an attribute that may be set between rounds.
        gate_only: The layer closes channels and never copies any.
        strides: See `BatchNormReLUConv`, also for the arguments below.
        padding: Likewise.
        kernel_dilation: Likewise.
        feature_group_count: Likewise.
        dropout_rate: Likewise.
        momentum: Likewise.
        epsilon: Likewise.
        axis_name: Likewise.
        use_running_average: Likewise.
        dtype: Likewise.
        param_dtype: Likewise.
        precision: Likewise.
        kernel_init: Likewise.
        rngs: Likewise.

    Raises:
        ConfigError: An argument is out of bounds.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import selconv_jax
        >>> layer = selconv_jax.nnx.SelectiveConv(4, 8, (3, 3), rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 6, 6, 4))).shape, layer.source[...].tolist()
        ((2, 6, 6, 8), [-1, -1, -1, -1])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        *,
        capacity: float = 1.0,
        gate_only: bool = False,
        strides: int | Sequence[int] | None = 1,
        padding: str | int | Sequence[int | tuple[int, int]] = "SAME",
        kernel_dilation: int | Sequence[int] | None = 1,
        feature_group_count: int = 1,
        dropout_rate: float = 0.0,
        momentum: float = 0.9,
        epsilon: float = 1e-5,
        axis_name: AxisName = None,
        use_running_average: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = fan_out_normal,
        rngs: nnx.Rngs,
    ) -> None:
        computation.check_capacity(capacity)
        super().__init__(
            in_features,
            out_features,
            kernel_size,
            strides=strides,
            padding=padding,
            kernel_dilation=kernel_dilation,
            feature_group_count=feature_group_count,
            dropout_rate=dropout_rate,
            momentum=momentum,
            epsilon=epsilon,
            axis_name=axis_name,
            use_running_average=use_running_average,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            kernel_init=kernel_init,
            rngs=rngs,
        )
        self.capacity = capacity
        self.gate_only = gate_only
        self.gate = Selectivity(jnp.ones(self.in_features, bool))
        if not gate_only:
            self.source = Selectivity(jnp.full(self.in_features, -1, jnp.int32))
            self.shift = nnx.Param(jnp.zeros((self.in_features, len(window_of(self))), self.param_dtype))

    def _select(self, inputs: Selected) -> Selected:
        source, shift = (None, None) if self.gate_only else (self.source[...], self.shift[...])
        return computation.select_channels(
            inputs,
            self.gate[...],
            source,
            shift,
            self.capacity,
            name=type(self).__name__,
            axis_name=self.axis_name,
        )
