"""What one round of re-allocation did."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization

__all__ = ["LayerReport", "Report"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LayerReport:
    """What one round did to one layer with ``C`` input channels.

    ``*L`` are the axes of a stack of layers (``nn.scan``, ``nn.vmap``); a single layer has none. Two are
    equal if their arrays are.

    Attributes:
        deallocated: ``[*L, C]`` bool, channels that were open and that the round closed.
        reallocated: ``[*L, C]`` bool, closed channels that the round filled: their kernel, batch norm and
            shift are rewritten. A channel can be both.
        open: ``[*L]`` int32, open channels after the round.
        copies: ``[*L]`` int32, channels that read another one (or themselves, shifted) after the round.
    """

    deallocated: jax.Array
    reallocated: jax.Array
    open: jax.Array
    copies: jax.Array

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LayerReport):
            return NotImplemented
        return all(
            np.array_equal(getattr(self, field.name), getattr(other, field.name))
            for field in dataclasses.fields(self)
        )

    __hash__ = None  # type: ignore[assignment]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Report:
    """What one round did to a model: `LayerReport` by the path of the layer, ``"block1/conv"`` style.

    The totals are Python integers, and traced ones where the report is traced. Flax's serialization
    (``flax.serialization.to_bytes``) takes a report.

    Example:
        >>> import jax, jax.numpy as jnp, selconv_jax
        >>> layer = selconv_jax.SelectiveConv(features=2, kernel_size=(1, 1))
        >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 4, 4, 8)), train=False)
        >>> variables, report = selconv_jax.reallocate(variables, jax.random.key(1))
        >>> report.deallocated, report.reallocated, report.channels
        (0, 0, 8)
    """

    layers: dict[str, LayerReport]

    @property
    def deallocated(self) -> int:
        """Channels that the round closed, in all layers."""
        return self._total("deallocated")

    @property
    def reallocated(self) -> int:
        """Closed channels that the round filled, in all layers."""
        return self._total("reallocated")

    @property
    def channels(self) -> int:
        """Input channels of all layers."""
        return sum(layer.deallocated.size for layer in self.layers.values())

    @property
    def open(self) -> int:
        """Open channels after the round, in all layers."""
        return self._total("open")

    @property
    def copies(self) -> int:
        """Channels that read through a source after the round, in all layers."""
        return self._total("copies")

    def _total(self, field: str) -> Any:
        values = [getattr(layer, field) for layer in self.layers.values()]
        if any(isinstance(value, jax.core.Tracer) for value in values):
            return sum(jnp.sum(value, dtype=jnp.int32) for value in values)
        return int(sum(np.sum(value) for value in jax.device_get(values)))


def _state_of(value: Any) -> dict[str, Any]:
    return {
        field.name: serialization.to_state_dict(getattr(value, field.name))
        for field in dataclasses.fields(value)
    }


def _restored(value: Any, state: dict[str, Any]) -> Any:
    return type(value)(
        **{
            field.name: serialization.from_state_dict(
                getattr(value, field.name), state[field.name], name=field.name
            )
            for field in dataclasses.fields(value)
        }
    )


for _kind in (LayerReport, Report):
    serialization.register_serialization_state(_kind, _state_of, _restored)
