"""Static layers: selective layers with a fixed allocation, the layout, and only the variables it needs."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype

from selconv_jax._xla.batch_norm import AxisName, Statistics, batch_statistics, join_statistics
from selconv_jax._xla.convolution import canonical_padding, canonical_window, convolve
from selconv_jax.compaction._places import index_mask, spread_channels, take_channels, take_repeated
from selconv_jax.functional._groups import without_rows
from selconv_jax.functional._select import select, select_with_statistics
from selconv_jax.functional._shift import channel_shift
from selconv_jax.nn._computation import Selected, window_of
from selconv_jax.nn._interception import call_in_place
from selconv_jax.nn._layers import BatchNormReLUConv

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class LayerLayout:
    """Fixed allocation of a layer, static in the compiled program.

    The layer computes with `reads` channels: those that it reads directly, then the copies, or in another
    order if ``order`` is given, as groups need it. All indices count from 0.

    Attributes:
        inputs: Number of input channels.
        own: Indices of the input channels that are read directly, without duplicates.
        copied: Index of the input channel that each copy reads through its shift.
        outputs: Number of output channels; 0: the output is unused and not computed.
        groups: Number of groups of the convolution.
        idle: Indices of the reads whose kernel rows are zero and stay zero.
        order: Permutation of ``[own, copied]`` that gives the reads; empty: the identity.
    """

    inputs: int
    own: tuple[int, ...]
    copied: tuple[int, ...]
    outputs: int
    groups: int = 1
    idle: tuple[int, ...] = ()
    order: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        positions = (*self.own, *self.copied)
        problem = ""
        if any(not 0 <= position < self.inputs for position in positions):
            problem = f"a channel is read that is not among the {self.inputs} inputs"
        elif len(set(self.own)) < len(self.own):
            problem = "a channel is read directly twice"
        elif self.order and sorted(self.order) != list(range(self.reads)):
            problem = f"order is not a permutation of {self.reads} channels"
        elif any(not 0 <= position < self.reads for position in self.idle):
            problem = f"an idle channel is not among the {self.reads} that are read"
        elif self.groups < 1 or self.outputs % self.groups or self.reads % self.groups:
            problem = f"{self.reads} reads and {self.outputs} outputs do not divide into {self.groups} groups"
        elif self.outputs > 0 and not self.reads:
            problem = "nothing is read"
        if problem:
            raise ValueError(f"the layout of a compacted layer is inconsistent: {problem}.")

    @property
    def reads(self) -> int:
        """Number of channels that the layer normalizes and convolves."""
        return len(self.own) + len(self.copied)

    @property
    def is_in_place(self) -> bool:
        """True if the reads are the input channels in order, some of them replaced by copies.

        They can then be computed as before compaction, without a gather of the channels read directly.
        """
        if not self.copied or self.reads != self.inputs:
            return False
        order = self.order or range(self.reads)
        return all(order[channel] == number for number, channel in enumerate(self.own))

    def to_json(self) -> dict[str, Any]:
        """Convert to plain numbers and lists, with runs of consecutive indices as ``[first, count]``."""
        return {
            name: _runs(value) if isinstance(value, tuple) else value
            for name, value in vars(self).items()
            if value != ()
        }

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "LayerLayout":
        """Restore a layout from the plain values of `to_json`; a `ValueError` if they are others."""
        try:
            fields = {
                name: _numbers(value) if isinstance(value, list) else int(value)
                for name, value in values.items()
            }
            return LayerLayout(**{"own": (), "copied": (), **fields})  # type: ignore[arg-type]
        except TypeError as error:
            raise ValueError(f"not the layout of a layer ({error}).") from error


def _runs(numbers: Iterable[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == sum(runs[-1]):
            runs[-1][1] += 1
        else:
            runs.append([number, 1])
    return runs


def _numbers(runs: Iterable[Iterable[int]]) -> tuple[int, ...]:
    return tuple(number for first, count in runs for number in range(int(first), int(first) + int(count)))


class StaticConv(BatchNormReLUConv):
    """Selective layer with a fixed allocation: batch norm, ReLU, dropout and convolution of what it reads.

    Variables, with ``R`` channels read: ``params`` kernel ``[*kernel_size, R / groups, features]``, scale
    ``[R]``, bias ``[R]`` and, if there are copies, shift ``[copies, len(kernel_size)]`` in pixels;
    ``batch_stats`` mean ``[R]``, var ``[R]``. There is no ``selectivity``.

    Attributes:
        layout: The allocation; ``features`` and ``feature_group_count`` must be those of the layout.

    Example:
        >>> layout = LayerLayout(inputs=6, own=(0, 1, 4), copied=(4,), outputs=8)
        >>> layer = StaticConv(features=8, kernel_size=(3, 3), layout=layout)
        >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 5, 5, 6)), train=False)
        >>> variables["params"]["kernel"].shape, variables["params"]["shift"].shape
        ((3, 3, 4, 8), (1, 2))
    """

    layout: LayerLayout | None = None

    @nn.compact
    def __call__(
        self,
        x: Array,
        train: bool | None = None,
        statistics: Statistics | None = None,
        deterministic: bool | None = None,
    ) -> Array:
        """Apply the layer to ``[N, *S, layout.inputs]``, see `BatchNormReLUConv.__call__`."""
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
        return super().__call__(x, train, statistics, deterministic)

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
        idle = jnp.asarray(index_mask(self._layout.idle, self._layout.reads))
        return inputs._replace(kernel=without_rows(inputs.kernel, idle))


def _in_place(
    x: Array, layout: LayerLayout, shift: Array | None, statistics: Statistics | None, axis_name: AxisName
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
    x: Array, layout: LayerLayout, shift: Array | None, statistics: Statistics | None, axis_name: AxisName
) -> tuple[Array, Statistics | None]:
    """Gather the channels that are read; return their statistics if known."""
    parts, known = [], []
    if layout.own:
        own = jax.tree.map(lambda values: take_channels(values, layout.own), (x, statistics))
        parts.append(own[0])
        known.append(own[1])
    if shift is not None:
        parts.append(channel_shift(take_repeated(x, layout.copied), shift))
        known.append(None if statistics is None else batch_statistics(parts[-1], axis_name))
    x = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)
    statistics = None if statistics is None else join_statistics(*known)
    if not layout.order:
        return x, statistics
    return jax.tree.map(lambda values: take_channels(values, layout.order), (x, statistics))


def call_static(layer: BatchNormReLUConv, layout: LayerLayout, x: Array, *args: Any, **kwargs: Any) -> Array:
    """Call a bound layer with a fixed allocation, with its variables in the same scope."""
    if layout.outputs == 0:
        return jnp.zeros((*output_shape(layer, x)[:-1], 0), _promoted(layer, x).dtype)
    fields = dataclasses.fields(BatchNormReLUConv)
    arguments: dict[str, Any] = {field.name: getattr(layer, field.name) for field in fields}
    arguments |= {"features": layout.outputs, "feature_group_count": layout.groups, "parent": layer.scope}
    return call_in_place(layer, StaticConv(**arguments, layout=layout), x, *args, **kwargs)


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
    return promote_dtype(x, jnp.zeros((), _parameter_dtype(layer)), dtype=layer.dtype)[0]


def _parameter_dtype(layer: BatchNormReLUConv) -> Any:
    """Return the type of the parameters in this call, which may have been cast since initialization."""
    kernel: Any = layer.get_variable("params", "kernel")
    if kernel is not None:
        return kernel.dtype
    # A layer without outputs has none: those of the network show whether all were cast.
    scope: Any = layer.scope
    types = {jnp.dtype(leaf.dtype) for leaf in jax.tree.leaves(scope.root.variables().get("params", {}))}
    is_cast = len(types) == 1 and jnp.issubdtype(next(iter(types)), jnp.floating)
    return next(iter(types)) if is_cast else layer.param_dtype
