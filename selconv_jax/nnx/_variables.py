"""The variables of NNX modules as nested dictionaries, which the functions of Linen variables take."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx, traverse_util

from selconv_jax.errors import ConfigError
from selconv_jax.nnx._layers import Selectivity


def linen_variables(module: nnx.Module) -> dict[str, Any]:
    """Collect the variables of an NNX module as a Linen model with the same attributes would hold them.

    Args:
        module: An NNX module; Linen layers in ``nnx.bridge.ToNNX`` must be initialized.

    Returns:
        ``{"params": ..., "batch_stats": ..., "selectivity": ...}``, nested by attribute name and, in lists,
        by the index as a string. Variables of other kinds, such as random number generators, are left out.

    Raises:
        ConfigError: It is no NNX module.

    Example:
        >>> import selconv_jax
        >>> from flax import nnx
        >>> from selconv_jax.nnx import linen_variables
        >>> layer = selconv_jax.nnx.SelectiveConv(16, 4, (3, 3), rngs=nnx.Rngs(0))
        >>> sorted(linen_variables(layer)["params"])
        ['bias', 'kernel', 'scale', 'shift']
        >>> selconv_jax.required_capacity(linen_variables(layer))
        0.0
    """
    if not isinstance(module, nnx.Module):
        raise ConfigError(
            f"module is a {type(module).__name__}; it must be a Flax NNX module. For Linen models there are "
            "selconv_jax.reallocate, selconv_jax.compact and others."
        )
    flat = {
        (collection, *map(str, path)): value if hasattr(value, "shape") else jnp.asarray(value)
        for path, variable in nnx.to_flat_state(nnx.state(module))
        if (collection := collection_of(variable)) and (value := variable.get_value()) is not None
    }
    return traverse_util.unflatten_dict(flat)


def update_module(module: nnx.Module, variables: Mapping[str, Any]) -> None:
    """Update the variables of an NNX module in place from a dictionary.

    Args:
        module: The module that `linen_variables` was called with.
        variables: What it returned, with other arrays of the same shapes and dtypes.

    Raises:
        ValueError: The dictionary and the module differ in their entries, or an entry in its shape or dtype.

    Example:
        >>> import selconv_jax
        >>> from flax import nnx
        >>> from selconv_jax.nnx import linen_variables, update_module
        >>> layer = selconv_jax.nnx.SelectiveConv(3, 4, (3, 3), rngs=nnx.Rngs(0))
        >>> variables = linen_variables(layer)
        >>> variables["params"]["scale"] = 2 * variables["params"]["scale"]
        >>> update_module(layer, variables)
        >>> layer.scale[...].tolist()
        [2.0, 2.0, 2.0]
    """
    flat = traverse_util.flatten_dict(dict(variables))
    state = nnx.to_flat_state(nnx.state(module))
    places = {
        (collection, *map(str, path)): (path, variable)
        for path, variable in state
        if (collection := collection_of(variable)) and variable.get_value() is not None
    }
    if strange := sorted(set(places) ^ set(flat)):
        owner = "module" if strange[0] in places else "dictionary"
        raise ValueError(
            f"the variables are not those of the module: only the {owner} has {'/'.join(strange[0])!r}. "
            "Pass what linen_variables returned, rewritten."
        )
    for key, (_, variable) in places.items():
        kinds = [
            (jnp.result_type(value), list(jnp.shape(value))) for value in (variable.get_value(), flat[key])
        ]
        if kinds[0] != kinds[1]:
            (dtype, shape), (new_dtype, new_shape) = kinds
            raise ValueError(
                f"{'/'.join(key)} is {dtype}{shape} in the module and {new_dtype}{new_shape} in the "
                "dictionary. Pass those of this module."
            )
    nnx.update(
        module,
        nnx.from_flat_state((path, variable.replace(flat[key])) for key, (path, variable) in places.items()),
    )


def collection_of(variable: nnx.Variable[Any]) -> str | None:
    """Return the Linen collection of a variable; None if it is none of the three."""
    if isinstance(variable, nnx.Param):
        return "params"
    if isinstance(variable, nnx.BatchStat):
        return "batch_stats"
    # Flax's bridge may have made a type of its own from the collection's name.
    is_allocation = isinstance(variable, Selectivity) or type(variable).__name__ == "selectivity"
    return "selectivity" if is_allocation else None
