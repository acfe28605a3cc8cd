"""A plan of a smaller network: takes its variables out of the whole one's, and puts them back."""

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
    """How a network becomes smaller; from `plan_compaction`.

    Attributes:
        model: The smaller network, called like the whole one: ``model.apply(variables, x, train=...)``.
        places: Where each variable of a changed module lies in the whole one, by collection, path and
            name; None where the smaller network has no such variable.
    """

    model: Compact
    places: Mapping[tuple[str, ...], Place | None]

    def take(self, variables: Mapping[str, Any]) -> Any:
        """The variables of the smaller network.

        A pure function of arrays, to be jitted and differentiated at will. It also takes trees like the
        collections, such as gradients or momentum: ``plan.take({"params": momentum})["params"]``.

        Args:
            variables: Collections of the whole network, or some of them.

        Returns:
            The same collections for ``model``, without ``selectivity`` where no layer has one any more.

        Raises:
            ValueError: A variable does not have the shape that was planned for.
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
        """The variables of the whole network with those of the smaller one put into their places.

        A pure function of arrays. What the smaller network does not have stays as it is.

        Args:
            variables: Collections of the whole network.
            small: Collections of the smaller one, or some of them.

        Returns:
            Collections of the whole network, in the structure of ``variables``.

        Raises:
            ValueError: A variable does not have the shape that was planned for, or ``small`` has one that
                the whole network has not.
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
        """The smaller network in the guise of the whole one, with variables of full size in and out.

        The allocation is that of the plan, whatever the gates and sources say that come in.
        """
        return FrozenModel(self)

    def _place(self, path: tuple[str, ...], leaf: Any) -> Place | None:
        place = self.places.get(path)
        if place is None or not hasattr(leaf, "shape"):
            return None
        if not place.fits(leaf.shape):
            raise ValueError(
                f"{'/'.join(path)} has shape {leaf.shape}, which is not that of the network this plan was "
                "made for. Plan anew for other variables."
            )
        return place


@dataclasses.dataclass(frozen=True)
class FrozenModel:
    """A network that computes with a smaller one; from `CompactionPlan.frozen_model`.

    Attributes:
        plan: The plan.
    """

    plan: CompactionPlan

    @property
    def dtype(self) -> Any:
        """Type of the computation, where the network has one; else None."""
        return self.plan.model.dtype

    def apply(self, variables: Mapping[str, Any], *args: Any, mutable: Any = False, **kwargs: Any) -> Any:
        """As ``apply`` of the whole network, with its variables.

        Args:
            variables: Variables of the whole network.
            *args: See there.
            mutable: See there. What changed comes back in full size; channels that are not computed any
                more keep what they had, where the whole network would move their running statistics.
            **kwargs: See there.

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
