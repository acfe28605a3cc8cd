"""Compaction plans, which convert between the variables of a network and those of the smaller one."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from flax import traverse_util
from flax.core import FrozenDict, freeze, unfreeze

from selconv_jax.compaction._liveness import Place
from selconv_jax.compaction._network import Compact

__all__ = ["CompactionPlan", "FrozenModel"]


@dataclasses.dataclass(frozen=True, eq=False)
class CompactionPlan:
    """Smaller network, and the conversion of variables to it and back; from `plan_compaction`.

    Attributes:
        model: The smaller network, called like the whole one: ``model.apply(variables, x, train=...)``.
        places: Place of each variable of a changed module in the whole network's variable, by collection,
            path and name; None: the smaller network has no such variable.
    """

    model: Compact
    places: Mapping[tuple[str, ...], Place | None]

    def take(self, variables: Mapping[str, Any]) -> Any:
        """Take the variables of the smaller network from those of the whole one.

        A pure function, which can be jitted and differentiated. It also accepts trees with the structure of a
        collection, such as gradients or momentum: ``plan.take({"params": momentum})["params"]``.

        Args:
            variables: Collections of the whole network, or some of them.

        Returns:
            The same collections for ``model``, without ``selectivity`` if no layer has one any more.

        Raises:
            ValueError: A variable does not have the planned shape.
        """
        flat = traverse_util.flatten_dict(unfreeze(dict(variables)), keep_empty_nodes=True)
        small = {}
        for path, leaf in flat.items():
            place = self._place(path, leaf)
            if place is not None:
                small[path] = place.take(leaf)
            elif path not in self.places:
                small[path] = leaf
        return _unflatten(small, variables)

    def put(self, variables: Mapping[str, Any], small: Mapping[str, Any]) -> Any:
        """Write the variables of the smaller network into those of the whole one.

        A pure function. Entries that the smaller network does not have are kept.

        Args:
            variables: Collections of the whole network.
            small: Collections of the smaller one, or some of them.

        Returns:
            Collections of the whole network, in the structure of ``variables``.

        Raises:
            ValueError: A variable does not have the planned shape, or is not one of the whole network.
        """
        flat = traverse_util.flatten_dict(unfreeze(dict(variables)), keep_empty_nodes=True)
        values = traverse_util.flatten_dict(unfreeze(dict(small)))
        removed = {path for path, place in self.places.items() if place is None}
        if unknown := [path for path in values if path not in flat or path in removed]:
            raise ValueError(
                f"the small variables have {'/'.join(unknown[0])}, for which the whole network has no place. "
                "Pass variables of plan.model and of the network that was planned for."
            )
        for path, value in values.items():
            place = self._place(path, flat[path])
            flat[path] = value if place is None else place.put(flat[path], value)
        return _unflatten(flat, variables)

    def frozen_model(self) -> "FrozenModel":
        """Wrap the smaller network so that it takes and returns variables of the whole network's shapes.

        The allocation is that of the plan; gates and sources in the variables are ignored.
        """
        return FrozenModel(self)

    def _place(self, path: tuple[str, ...], leaf: Any) -> Place | None:
        place = self.places.get(path)
        if place is None or not hasattr(leaf, "shape"):
            return None
        if not place.fits(leaf.shape):
            raise ValueError(
                f"{'/'.join(path)} has shape {leaf.shape}, which is not that of the network this plan was "
                "made for. Make a new plan for other variables."
            )
        return place


@dataclasses.dataclass(frozen=True)
class FrozenModel:
    """Network with whole variables that computes with the smaller one; from `CompactionPlan.frozen_model`.

    Attributes:
        plan: The plan.
    """

    plan: CompactionPlan

    @property
    def dtype(self) -> Any:
        """Type of the computation; None if the network has no such attribute."""
        return self.plan.model.dtype

    def apply(self, variables: Mapping[str, Any], *args: Any, mutable: Any = False, **kwargs: Any) -> Any:
        """Apply the network, as ``apply`` of the whole network does.

        Args:
            variables: Variables of the whole network.
            *args: Arguments of the network.
            mutable: As in ``flax.linen.Module.apply``. Changed collections have the whole network's shapes.
                Removed channels keep their running statistics, which the whole network would update.
            **kwargs: Further arguments of ``apply``.

        Returns:
            The network's output; with ``mutable`` the output and the changed collections.
        """
        apply: Callable[..., Any] = self.plan.model.apply
        result = apply(self.plan.take(variables), *args, mutable=mutable, **kwargs)
        if mutable is False:
            return result
        output, changed = result
        known = {name: variables[name] for name in changed if name in variables}
        whole = self.plan.put(known, {name: changed[name] for name in known})
        return output, {**changed, **whole}


def _unflatten(flat: dict[tuple[str, ...], Any], like: Any) -> Any:
    tree = traverse_util.unflatten_dict(flat)
    return freeze(tree) if isinstance(like, FrozenDict) else tree
