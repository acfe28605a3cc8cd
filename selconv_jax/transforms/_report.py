"""Reports of a round of re-allocation."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LayerReport:
    """Changes that one round made to one layer with ``C`` input channels.

    ``*L`` are the axes of a stack of layers (``nn.scan``, ``nn.vmap``); a single layer has none. Two
    reports are equal if their arrays are.

    Attributes:
        deallocated: ``[*L, C]`` bool, open channels that the round closed.
        reallocated: ``[*L, C]`` bool, closed channels that the round filled, rewriting their kernel rows,
            batch norm and shift. A channel can be both.
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

    def __repr__(self) -> str:
        return f"LayerReport({', '.join(f'{name}={count}' for name, count in _counts(self).items())})"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Report:
    """Changes that one round made to a model: a `LayerReport` by layer path, such as ``"block1/conv"``.

    The totals are Python integers, or traced ones if the report is traced. Reports can be serialized with
    ``flax.serialization.to_bytes``.

    Example:
        >>> import jax, jax.numpy as jnp, selconv_jax
        >>> layer = selconv_jax.SelectiveConv(features=2, kernel_size=(1, 1))
        >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 4, 4, 8)), train=False)
        >>> variables, report = selconv_jax.reallocate(variables, jax.random.key(1))
        >>> report
        Report(deallocated=0, reallocated=0, open=8, copies=0, channels=8, layers=1)
    """

    layers: dict[str, LayerReport]

    def __repr__(self) -> str:
        counts = {**self._summed(), "layers": len(self.layers)}
        return f"Report({', '.join(f'{name}={count}' for name, count in counts.items())})"

    def summary(self) -> str:
        """Tabulate the counts of every layer and their totals.

        ``?`` stands for values that are traced or are not arrays.

        Example:
            >>> import jax, jax.numpy as jnp, selconv_jax
            >>> layer = selconv_jax.SelectiveConv(features=2, kernel_size=(1, 1))
            >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 4, 4, 8)), train=False)
            >>> print(selconv_jax.reallocate(variables, jax.random.key(1))[1].summary())
            layer    deallocated  reallocated         open       copies     channels
            (model)            0            0            8            0            8
            total              0            0            8            0            8
        """
        rows = [(name or "(model)", _counts(layer)) for name, layer in self.layers.items()]
        rows.append(("total", self._summed()))
        width = max(len(name) for name, _ in [*rows, ("layer", None)])
        lines = [f"{'layer':<{width}}" + "".join(f"{column:>13}" for column in rows[-1][1])]
        lines += [f"{name:<{width}}" + "".join(f"{n:>13}" for n in counts.values()) for name, counts in rows]
        return "\n".join(lines)

    def _summed(self) -> dict[str, int | str]:
        columns = zip(*(_counts(layer).values() for layer in self.layers.values()), strict=True)
        sums = ["?" if "?" in column else sum(column) for column in columns] or [0] * len(_COLUMNS)
        return dict(zip(_COLUMNS, sums, strict=True))

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


_COLUMNS = ("deallocated", "reallocated", "open", "copies", "channels")


def _counts(layer: LayerReport) -> dict[str, Any]:
    """Count the channels of a layer, ``?`` where they are traced or lie in other processes."""

    def count(value: Any) -> int | str:
        try:
            return int(np.sum(jax.device_get(value)))
        except (TypeError, ValueError, RuntimeError, jax.errors.JAXTypeError):
            return "?"

    counts = {name: count(getattr(layer, name)) for name in _COLUMNS[:-1]}
    return {**counts, "channels": getattr(layer.deallocated, "size", "?")}


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
