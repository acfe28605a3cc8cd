"""Selective layers in a model's variables: finding, checking and replacing them."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from flax.core import FrozenDict, meta, unfreeze

from selconv_jax._utils.arguments import check_dtype
from selconv_jax._utils.modules import as_variables, is_nnx_state
from selconv_jax.functional._allocation import LayerState
from selconv_jax.functional._groups import group_count

Path = tuple[str, ...]
Variables = Mapping[str, Any]

# Where a layer of path p keeps each field: variables[collection][p][field].
_COLLECTION = {
    "kernel": "params",
    "scale": "params",
    "bias": "params",
    "shift": "params",
    "mean": "batch_stats",
    "var": "batch_stats",
    "gate": "selectivity",
    "source": "selectivity",
}
_OPTIONAL = ("source", "shift")


def layer_states(variables: Any) -> dict[str, LayerState]:
    """Collect the selective and gate-only layers of a model, by path.

    Layers stacked by ``nn.scan`` or ``nn.vmap`` are one `LayerState` whose arrays have the stack's axes as
    leading axes: gate ``[*L, C]``, kernel ``[*L, *K, C / G, O]``, and so on.

    Args:
        variables: The model's variables: ``params``, ``batch_stats``, ``selectivity``; or an NNX module.

    Returns:
        `LayerState` by the path of the layer, parts joined by ``/`` (``""`` for a model that is one layer).

    Raises:
        ValueError: There is no selective layer, or its arrays are missing, inconsistent in shape, or of the
            wrong type (gates are boolean, sources integers).

    Example:
        >>> import jax, jax.numpy as jnp, selconv_jax
        >>> layer = selconv_jax.SelectiveConv(features=4, kernel_size=(3, 3))
        >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 8, 8, 16)), train=False)
        >>> states = selconv_jax.layer_states(variables)
        >>> list(states), states[""].kernel.shape, int(states[""].gate.sum())
        ([''], (3, 3, 16, 4), 16)
    """
    variables = as_variables(variables)
    flat = {
        collection: traverse_util.flatten_dict(unfreeze(variables.get(collection, {})))
        for collection in ("params", "batch_stats", "selectivity")
    }
    paths = [path[:-1] for path in flat["selectivity"] if path[-1] == "gate"]
    if not paths:
        if is_nnx_state(variables):
            raise ValueError(
                f"variables is an NNX {type(variables).__name__}; pass the module, such as "
                "nnx.merge(graphdef, state)."
            )
        raise ValueError(
            "no selective layer found: looked for 'gate' in variables['selectivity'], among the "
            f"collections {sorted(variables)}. Use selconv_jax.SelectiveConv, in NNX "
            "selconv_jax.nnx.SelectiveConv, and pass all its variables. A compacted network has none: its "
            "allocation is fixed."
        )
    for path in paths:
        if not all(isinstance(part, str) for part in path):
            raise ValueError(
                f"selective layer {path}: keys of variables must be strings. Pass an NNX module itself, not "
                "its state."
            )
        if any("/" in part for part in path):
            raise ValueError(f"selective layer {path}: rename the module, its name must not contain '/'.")
    return {"/".join(path): _layer_state(path, flat) for path in paths}


def merge_layers(variables: Variables, states: Mapping[str, LayerState]) -> Any:
    """Replace the arrays of selective layers in a model's variables.

    Args:
        variables: The model's variables.
        states: Layers by path, as from `layer_states`.

    Returns:
        Variables of the same structure; leaves that belong to no layer are the same objects.
    """
    new: dict[Path, Any] = {}
    for name, state in states.items():
        path = tuple(name.split("/")) if name else ()
        for field, collection in _COLLECTION.items():
            if (value := getattr(state, field)) is not None:
                new[collection, *path, field] = value
    return _replaced(variables, new, ())


def are_replicas(states: Mapping[str, LayerState]) -> jax.Array | None:
    """Check whether the variables are replicas of a model, one per device, rather than stacks of layers.

    Replicas have a leading axis along which all trainable parameters are equal. Layers of a real stack have
    been initialized with different values.

    Args:
        states: Layers by path, as from `layer_states`.

    Returns:
        ``[]`` bool; None if the shapes already rule it out.
    """
    # Replication gives all layers a leading axis of the same size; one layer without it rules it out.
    counts = {state.gate.shape[0] if state.gate.ndim > 1 else 1 for state in states.values()}
    if len(counts) > 1 or counts == {1}:
        return None
    trained = [leaf for state in states.values() for leaf in (state.kernel, state.scale, state.bias)]
    return jnp.stack([jnp.all(jnp.max(leaf, axis=0) == jnp.min(leaf, axis=0)) for leaf in trained]).all()


def refuse_replicas(states: Mapping[str, LayerState]) -> None:
    """Raise a ValueError if the layers, which hold concrete arrays, are replicas, see `are_replicas`."""
    if jax.device_get(jax.jit(are_replicas)(states)):
        count = next(iter(states.values())).gate.shape[0]
        raise ValueError(
            f"the variables are {count} replicas of one model: along axis 0 every selective layer holds the "
            "same parameters, and each replica would draw for itself. Re-allocate one and replicate it again "
            "(variables = flax.jax_utils.unreplicate(variables)), or call reallocate inside of jax.pmap. In "
            "a stack of layers give each its own numbers: split_rngs={'params': True}."
        )


def _replaced(tree: Any, new: Mapping[Path, Any], path: Path) -> Any:
    """Replace the leaves at some paths of a tree; types of mappings, empty ones and boxes are kept."""
    if isinstance(tree, Mapping):
        kind = next((kind for kind in (FrozenDict, OrderedDict) if isinstance(tree, kind)), dict)
        return kind({key: _replaced(child, new, (*path, key)) for key, child in tree.items()})
    if path in new and isinstance(tree, meta.AxisMetadata):
        return tree.replace_boxed(new[path])
    return new.get(path, tree)


def _layer_state(path: Path, flat: dict[str, dict[Path, Any]]) -> LayerState:
    name = "/".join(path)
    fields: dict[str, Any] = {}
    for field, collection in _COLLECTION.items():
        value = meta.unbox(flat[collection].get((*path, field)))
        if value is None and field not in _OPTIONAL:
            raise ValueError(
                f"selective layer {name!r}: variables[{collection!r}] has no {field!r} for it. "
                "Pass params, batch_stats and selectivity of the same model."
            )
        if value is not None and not hasattr(value, "shape"):
            raise ValueError(
                f"selective layer {name!r}: {field} is a {type(value).__name__}, expected an array."
            )
        fields[field] = value
    if (fields["source"] is None) != (fields["shift"] is None):
        raise ValueError(
            f"selective layer {name!r}: it must have both 'source' (selectivity) and 'shift' "
            "(params), or, if it is gate-only, neither."
        )
    state = LayerState(**fields)
    check_dtype(f"selective layer {name!r}: gate", state.gate, np.bool_, "bool; convert it (gate != 0)")
    if state.source is not None:
        check_dtype(f"selective layer {name!r}: source", state.source, np.integer, "integer")
    _check_shapes(name, state)
    return state


def _check_shapes(name: str, state: LayerState) -> None:
    """Raise a ValueError unless the shapes are those of one layer, or of layers stacked on leading axes."""
    channels, kernel = state.gate.shape, state.kernel.shape
    if not channels:
        raise ValueError(f"selective layer {name!r}: gate has shape (), expected [C].")
    stack = channels[:-1]
    if kernel[: len(stack)] != stack or len(kernel) < len(stack) + 2:
        problem = f"kernel has shape {kernel}, expected {(*stack, '*K', 'C / groups', 'O')}"
    else:
        expected = dict.fromkeys(("scale", "bias", "mean", "var", "source"), channels)
        expected["shift"] = (*channels, len(kernel) - len(stack) - 2)
        problem = "; ".join(
            f"{field} has shape {value.shape}, expected {shape}"
            for field, shape in expected.items()
            if (value := getattr(state, field)) is not None and value.shape != shape
        )
    if problem:
        raise ValueError(
            f"selective layer {name!r}, whose gate has shape {channels}: {problem}. Layers of nn.scan and "
            "nn.vmap must be stacked on axis 0 of every collection: variable_axes={'params': 0, "
            "'batch_stats': 0, 'selectivity': 0}."
        )
    try:
        group_count(channels[-1], kernel)
    except ValueError as error:
        raise ValueError(f"selective layer {name!r}: {error}") from error
