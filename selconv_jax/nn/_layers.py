"""Batch norm, ReLU and convolution as one Flax (Linen) module: the selective layer and its plain twin."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype, Initializer, PrecisionLike

from selconv_jax._xla.batch_norm import AxisName, Statistics, statistics_dtype
from selconv_jax.errors import ConfigError
from selconv_jax.nn import _computation as computation
from selconv_jax.nn._computation import Selected, fan_out_normal, window_of

Array = jax.Array


class BatchNormReLUConv(nn.Module):
    """Batch norm, ReLU, dropout and convolution without bias: the plain twin of `SelectiveConv`.

    Variables, with ``C`` input channels: ``params`` kernel ``[*kernel_size, C / groups, features]``, scale
    ``[C]``, bias ``[C]`` (of the batch norm); ``batch_stats`` mean ``[C]``, var ``[C]``, float32 or wider.

    The running variance uses the unbiased batch estimate; normalization uses the biased one.

    Attributes:
        features: Number of output channels ``O``.
        kernel_size: One size per spatial dimension, which sets the rank of the input. An integer means
            one dimension, as in `flax.linen.Conv`.
        strides: Strides of the window, one for all dimensions or one each; None: 1.
        padding: ``"SAME"``, ``"SAME_LOWER"``, ``"VALID"``, ``"CIRCULAR"``, ``"REFLECT"``, ``"CAUSAL"`` (one
            dimension), a number, or one number or ``(low, high)`` per dimension. ``"CAUSAL"`` pads on the
            left only, so that no output reads a later input.
        kernel_dilation: Spacing of the kernel's taps, one for all dimensions or one each; None: 1.
        feature_group_count: Number of groups: the outputs of a group read only the ``C / groups`` input
            channels of that group. Divides ``C`` and ``features``.
        dropout_rate: Fraction of the activations that dropout zeroes in training; needs a ``dropout`` key.
        momentum: Decay rate of the running statistics: the fraction of the old value that a step keeps.
        epsilon: Added to the variance.
        axis_name: Mapped axis (of ``jax.shard_map``, ``vmap`` or ``pmap``) over which the statistics of the
            batch are computed, as in `flax.linen.BatchNorm`; not needed under ``jit``, where they are those
            of the global batch.
        train: Default for ``train`` where a call omits it.
        dtype: Type of the computation; None: inferred from the input and parameters. Statistics are
            computed in float32 or wider.
        param_dtype: Type of the parameters.
        precision: Precision of the convolution, see `jax.lax.Precision`.
        kernel_init: Initializer of the kernel.

    Raises:
        ConfigError: An attribute is out of bounds.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from selconv_jax import BatchNormReLUConv
        >>> layer = BatchNormReLUConv(features=8, kernel_size=(3, 3), strides=2)
        >>> x = jnp.ones((2, 6, 6, 4))
        >>> variables = layer.init(jax.random.key(0), x, train=False)
        >>> y, updates = layer.apply(variables, x, train=True, mutable=["batch_stats"])
        >>> y.shape, sorted(variables), sorted(updates)
        ((2, 3, 3, 8), ['batch_stats', 'params'], ['batch_stats'])
    """

    features: int
    kernel_size: int | Sequence[int]
    strides: int | Sequence[int] | None = 1
    padding: str | int | Sequence[int | tuple[int, int]] = "SAME"
    kernel_dilation: int | Sequence[int] | None = dataclasses.field(default=1, kw_only=True)
    feature_group_count: int = dataclasses.field(default=1, kw_only=True)
    dropout_rate: float = dataclasses.field(default=0.0, kw_only=True)
    momentum: float = dataclasses.field(default=0.9, kw_only=True)
    epsilon: float = dataclasses.field(default=1e-5, kw_only=True)
    axis_name: AxisName = dataclasses.field(default=None, kw_only=True)
    train: bool | None = dataclasses.field(default=None, kw_only=True)
    dtype: Dtype | None = dataclasses.field(default=None, kw_only=True)
    param_dtype: Dtype = dataclasses.field(default=jnp.float32, kw_only=True)
    precision: PrecisionLike = dataclasses.field(default=None, kw_only=True)
    kernel_init: Initializer = dataclasses.field(default=fan_out_normal, kw_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.parent, int | Sequence):  # Flax takes a fifth value by position as the parent
            raise ConfigError("what follows padding is given by name, such as kernel_dilation=2.")
        computation.check_conv_settings(self, self.features)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: Array,
        train: bool | None = None,
        statistics: Statistics | None = None,
        deterministic: bool | None = None,
    ) -> Array:
        """Apply the layer.

        Args:
            x: ``[N, *S, C]`` floating.
            train: Normalize with the statistics of the batch and update the running ones, for which
                ``batch_stats`` must be mutable; otherwise normalize with the running ones. None: the
                attribute ``train``.
            statistics: Statistics of ``x`` if they are known: those of its concatenated parts from
                `batch_statistics`, joined by `join_statistics`. In a dense network, where many layers read
                the same channels, they are then computed once. The result is the same, gradients included.
                Ignored unless ``train``.
            deterministic: Compute without dropout; None: ``not train``.

        Returns:
            ``[N, *S', features]``.

        Raises:
            ValueError: The rank of the input does not match ``kernel_size``, its channels do not divide
                into the groups, the statistics have another number of channels, or ``train`` is traced or
                given by neither call nor attribute.
            flax.errors.ModifyScopeVariableError: ``train`` is true and ``batch_stats`` is not mutable.
        """
        name = self.name or type(self).__name__
        train = _mode(name, self.train, train)
        computation.check_inputs(self, name, x, statistics)
        shape = (*window_of(self), x.shape[-1] // self.feature_group_count, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        x, kernel = promote_dtype(x, kernel, dtype=self.dtype)

        x, kernel, statistics = self._select(Selected(x, kernel, statistics if train else None))
        x = _norm_relu(self, x, train, statistics)
        if self.dropout_rate > 0:
            x = nn.Dropout(self.dropout_rate)(x, not train if deterministic is None else deterministic)
        return computation.apply_convolution(self, x, kernel)

    @nn.nowrap
    def _select(self, inputs: Selected) -> Selected:
        """Return what batch norm and convolution compute with; `SelectiveConv` overrides it."""
        return inputs


class SelectiveConv(BatchNormReLUConv):
    """Selective convolution: channel selection, batch norm, ReLU, dropout, gate, convolution.

    Computes the forward pass of the method's "One selective layer". The layer never changes its
    allocation; `selconv_jax.reallocate` does, for all such layers of a model at once.

    Variables beyond those of `BatchNormReLUConv`: ``selectivity`` gate ``[C]`` bool and source ``[C]`` int32
    (-1: the channel reads itself); ``params`` shift ``[C, len(kernel_size)]`` in pixels, row first. A
    gate-only layer has the gate alone: its closed channels are never refilled. How many channels compete for
    the closed slots is set per round, not per layer: `selconv_jax.AllocationRule.top_k`.

    Attributes:
        capacity: Number of copies that the compiled program provides for, as a fraction of the channels in
            [0, 1]. The cost grows with it; the result is the same as long as it suffices. At 0 the program
            is that of the plain layer. `selconv_jax.required_capacity` computes what a model needs. With too
            many copies, the layer raises a `selconv_jax.ConfigError` if its sources are concrete, and
            returns NaN if they are traced.
        gate_only: The layer closes channels and never copies any.

    The other attributes are those of `BatchNormReLUConv`.

    Raises:
        ConfigError: An attribute is out of bounds, or ``capacity`` is too small for concrete sources.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from selconv_jax import SelectiveConv
        >>> layer = SelectiveConv(features=8, kernel_size=(3, 3))
        >>> x = jnp.ones((2, 6, 6, 4))
        >>> variables = layer.init(jax.random.key(0), x, train=False)
        >>> y, updates = layer.apply(variables, x, train=True, mutable=["batch_stats"])
        >>> y.shape, sorted(variables["selectivity"])
        ((2, 6, 6, 8), ['gate', 'source'])
    """

    capacity: float = dataclasses.field(default=1.0, kw_only=True)
    gate_only: bool = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        computation.check_capacity(self.capacity)
        super().__post_init__()

    @nn.nowrap
    def _select(self, inputs: Selected) -> Selected:
        channels = inputs.x.shape[-1]
        gate = self.variable("selectivity", "gate", jnp.ones, (channels,), jnp.bool_)
        source = shift = None
        if not self.gate_only:
            source = self.variable("selectivity", "source", jnp.full, (channels,), -1, jnp.int32).value
            shape = (channels, inputs.x.ndim - 2)
            shift = self.param("shift", nn.initializers.zeros, shape, self.param_dtype)
        name = "/".join(self.path) or type(self).__name__
        return computation.select_channels(
            inputs, gate.value, source, shift, self.capacity, name=name, axis_name=_axis_name(self)
        )


class BatchNormReLU(nn.Module):
    """Batch norm and ReLU alone, as at the end of a network; the same variables as in `BatchNormReLUConv`.

    The arguments and errors of a call are those of `BatchNormReLUConv`, without ``deterministic``.

    Attributes:
        momentum: Decay rate of the running statistics: the fraction of the old value that a step keeps.
        epsilon: Added to the variance.
        axis_name: See `BatchNormReLUConv`.
        train: Default for ``train`` where a call omits it.
        param_dtype: Type of the parameters.

    Raises:
        ConfigError: An attribute is out of bounds.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from selconv_jax.nn import BatchNormReLU
        >>> layer, x = BatchNormReLU(), jnp.array([[1.0, -2.0], [-1.0, 2.0]])
        >>> variables = layer.init(jax.random.key(0), x, train=False)
        >>> y, updates = layer.apply(variables, x, train=True, mutable=["batch_stats"])
        >>> y.round(2).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """

    momentum: float = dataclasses.field(default=0.9, kw_only=True)
    epsilon: float = dataclasses.field(default=1e-5, kw_only=True)
    axis_name: AxisName = dataclasses.field(default=None, kw_only=True)
    train: bool | None = dataclasses.field(default=None, kw_only=True)
    param_dtype: Dtype = dataclasses.field(default=jnp.float32, kw_only=True)

    def __post_init__(self) -> None:
        computation.check_norm_settings(self)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, train: bool | None = None, statistics: Statistics | None = None) -> Array:
        """Apply batch norm and ReLU to ``[N, *S, C]``, see `BatchNormReLUConv.__call__`."""
        train = _mode(self.name or type(self).__name__, self.train, train)
        return _norm_relu(self, x, train, statistics)


def _norm_relu(
    module: BatchNormReLUConv | BatchNormReLU, x: Array, train: bool, statistics: Statistics | None
) -> Array:
    """Apply batch norm and ReLU with ``module``'s variables; in training, update its running statistics."""
    channels = (x.shape[-1],)
    scale = module.param("scale", nn.initializers.ones, channels, module.param_dtype)
    bias = module.param("bias", nn.initializers.zeros, channels, module.param_dtype)
    dtype = statistics_dtype(module.param_dtype)
    mean = module.variable("batch_stats", "mean", jnp.zeros, channels, dtype)
    var = module.variable("batch_stats", "var", jnp.ones, channels, dtype)
    running = Statistics(mean.value, var.value)
    y, running = computation.norm_relu(module, x, scale, bias, running, train, statistics, _axis_name(module))
    if train and not module.is_initializing():
        mean.value, var.value = running
    return y


def _axis_name(module: BatchNormReLUConv | BatchNormReLU) -> AxisName:
    """Return the axis to compute statistics over; initialization runs outside of the mapped function."""
    return None if module.is_initializing() else module.axis_name


def _mode(name: str, attribute: bool | None, argument: Any) -> bool:
    """Return whether a call trains: what it was given, else the module's attribute."""
    if isinstance(argument, jax.core.Tracer):
        raise ValueError(
            f"{name}: train is traced, but it decides what is compiled. Pass it by position, with "
            "static_argnums=(2,) for nn.remat, in_axes=nn.broadcast for nn.scan, in_axes=(0, None) for "
            "nn.vmap; under jax.jit, make it a static argument."
        )
    if argument is None and attribute is None:
        raise ValueError(
            f"{name}: pass train=True or train=False, in the call or as an attribute of the layer."
        )
    return bool(attribute if argument is None else argument)
