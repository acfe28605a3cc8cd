"""Selective layers in Flax NNX modules: their variables as the dictionaries that the transforms take.

A layer enters an NNX module as ``nnx.bridge.ToNNX(SelectiveConv(...))``. Every function of this package
that takes a model's variables then takes ``linen_variables(module)``; ``update_module`` puts rewritten
variables back.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx, traverse_util

__all__ = ["linen_variables", "update_module"]


def linen_variables(module: nnx.Module) -> dict[str, Any]:
    """The variables of an NNX module, as a Linen model with the same attributes would hold them.

    Args:
        module: An NNX module, initialized (``nnx.bridge.lazy_init``).

    Returns:
        ``{"params": ..., "batch_stats": ..., "selectivity": ...}``, nested by the names of the attributes
        and, in lists, by the index as a string. Other kinds of variables (of random numbers, say) are
        left out.

    Example:
        >>> import jax, jax.numpy as jnp, selconv_jax
        >>> from flax import nnx
        >>> layer = nnx.bridge.ToNNX(selconv_jax.SelectiveConv(4, (3, 3)), rngs=nnx.Rngs(0))
        >>> layer = layer.lazy_init(jnp.ones((1, 8, 8, 16)), train=False)
        >>> allocation = selconv_jax.AllocationRule(threshold=0.1)
        >>> variables, report = selconv_jax.reallocate(linen_variables(layer), jax.random.key(0), allocation)
        >>> update_module(layer, variables)
        >>> int((layer.source[...] >= 0).sum()) == report.reallocated > 0
        True
    """
    flat = {
        (collection, *map(str, path)): variable[...]
        for path, variable in nnx.to_flat_state(nnx.state(module))
        if (collection := _collection(variable))
    }
    return traverse_util.unflatten_dict(flat)


def update_module(module: nnx.Module, variables: Mapping[str, Any]) -> None:
    """Set the variables of an NNX module, in place, to those of a dictionary.

    Args:
        module: The module that `linen_variables` was called with.
        variables: What it returned, with other arrays of the same shapes in it.

    Raises:
        ValueError: The dictionary has an entry that the module lacks, lacks one that the module has, or
            has one of another shape or dtype.
    """
    flat = traverse_util.flatten_dict(dict(variables))
    state = nnx.to_flat_state(nnx.state(module))
    places = {
        (collection, *map(str, path)): (path, variable)
        for path, variable in state
        if (collection := _collection(variable))
    }
    if strange := sorted(set(places) ^ set(flat)):
        owner = "module" if strange[0] in places else "dictionary"
        raise ValueError(
            f"the variables are not those of the module: only the {owner} has {'/'.join(strange[0])!r}. "
            "Pass what linen_variables returned, rewritten."
        )
    for key, (_, variable) in places.items():
        old, new = variable.get_value(), flat[key]
        if (old.shape, old.dtype) != (jnp.shape(new), jnp.result_type(new)):
            raise ValueError(
                f"{'/'.join(key)} is {old.dtype}{list(old.shape)} in the module and "
                f"{jnp.result_type(new)}{list(jnp.shape(new))} in the dictionary. Pass those of this module."
            )
    nnx.update(
        module,
        nnx.from_flat_state((path, variable.replace(flat[key])) for key, (path, variable) in places.items()),
    )


def _collection(variable: nnx.Variable[Any]) -> str | None:
    """The Linen collection of a variable; None if it belongs to none that matters here."""
    if isinstance(variable, nnx.Param):
        return "params"
    if isinstance(variable, nnx.BatchStat):
        return "batch_stats"
    # The bridge makes this type from the collection's name.
    selectivity = nnx.variable_type_from_name("selectivity", allow_register=True)
    return "selectivity" if isinstance(variable, selectivity) else None
