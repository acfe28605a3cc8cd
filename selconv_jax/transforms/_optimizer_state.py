"""Optimizer state of the parameter entries that re-allocation rewrote."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from selconv_jax._utils.modules import is_nnx_module
from selconv_jax._xla.explicit_axes import replicated, sharded_as
from selconv_jax.functional._groups import kernel_rows
from selconv_jax.transforms._report import Report


def rewritten_mask(params: Mapping[str, Any], report: Report) -> Any:
    """Mark the parameter entries that a round of re-allocation rewrote.

    Args:
        params: The model's ``params``.
        report: What `selconv_jax.reallocate` returned.

    Returns:
        A tree like ``params`` of bool arrays that broadcast against them, true at the re-allocated channels:
        kernel ``[*1, C, 1]`` (with groups ``[*1, C / G, O]``), scale and bias ``[C]``, shift ``[C, 1]``,
        after the leading axes of a stack of layers; a scalar false for all other parameters.

    Raises:
        ValueError: ``params`` has no kernel for a layer of the report: the two belong to different models; or
            it is an NNX module.

    Example:
        >>> import jax, jax.numpy as jnp, selconv_jax
        >>> layer = selconv_jax.SelectiveConv(features=4, kernel_size=(3, 3))
        >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 8, 8, 16)), train=False)
        >>> variables, report = selconv_jax.reallocate(
        ...     variables, jax.random.key(1), selconv_jax.AllocationRule(threshold=0.1))
        >>> masks = selconv_jax.rewritten_mask(variables["params"], report)
        >>> masks["kernel"].shape, int(masks["kernel"].sum()) == report.reallocated
        ((1, 1, 16, 1), True)
    """
    kernels = set()

    def mask(path: tuple[Any, ...], leaf: Any) -> jax.Array:
        *layer_path, name = _names(path)
        layer = report.layers.get("/".join(layer_path))
        if layer is None or name not in ("kernel", "scale", "bias", "shift"):
            return jnp.zeros((), jnp.bool_)
        if name == "kernel":
            kernels.add("/".join(layer_path))
            return kernel_rows(layer.reallocated, leaf.shape)
        return jax.lax.expand_dims(layer.reallocated, range(layer.reallocated.ndim, leaf.ndim))

    if is_nnx_module(params):
        raise ValueError(
            "params is an NNX module. Its optimizer's state is reset by selconv_jax.nnx.reset_rewritten; a "
            "mask is made from selconv_jax.nnx.linen_variables(module)['params']."
        )
    masks = jax.tree_util.tree_map_with_path(mask, params)
    if missing := sorted(set(report.layers) - kernels):
        raise ValueError(
            f"params has no kernel for selective layer {missing[0]!r}, which the report is about. Pass the "
            "'params' of the model that was re-allocated; after a round of a part of it, that part's, or a "
            "selconv_jax.Report whose names of layers begin with the part's."
        )
    return masks


def _keys(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """Drop attributes from a leaf's path: boxes around leaves (as in Flax NNX), fields of named tuples."""
    return tuple(key for key in path if not isinstance(key, jax.tree_util.GetAttrKey))


def _names(path: tuple[Any, ...]) -> list[str]:
    return jax.tree_util.keystr(_keys(path), simple=True, separator="/").split("/")


class _Parameter(NamedTuple):
    """What resetting the state of one parameter needs to know of it."""

    rewritten: jax.Array  # bool mask, in the parameter's shape
    shape: tuple[int, ...]
    name: str


def reset_rewritten(
    optimizer: optax.GradientTransformation, opt_state: Any, params: Mapping[str, Any], report: Report
) -> Any:
    """Reinitialize the optimizer state of the parameter entries that re-allocation rewrote.

    The published method lets a filled slot keep the momentum of the channel that it replaced, which is
    also what happens if this function is not called. Calling it starts the slot with fresh state.

    All per-entry state (momentum, moments, accumulated gradients, averages and iterates of the parameters
    themselves) is set, at the rewritten entries, to what ``optimizer.init(params)`` returns: mostly 0, for
    averages of the parameters the new parameters. It is found by the paths of the parameters, which
    optimizers keep in their states.

    Args:
        optimizer: The optax optimizer that ``opt_state`` belongs to.
        opt_state: Its state.
        params: The model's ``params``.
        report: What `selconv_jax.reallocate` returned.

    Returns:
        The state with the same structure, shapes and dtypes.

    Raises:
        ValueError: The state does not belong to this optimizer and these parameters, or a part of it does
            not have one entry per parameter entry (such as factored second moments).

    Example:
        >>> import jax, jax.numpy as jnp, optax, selconv_jax
        >>> layer = selconv_jax.SelectiveConv(features=4, kernel_size=(3, 3))
        >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 8, 8, 16)), train=False)
        >>> optimizer = optax.sgd(0.1, momentum=0.9)
        >>> opt_state = optimizer.init(variables["params"])
        >>> variables, report = selconv_jax.reallocate(variables, jax.random.key(1))
        >>> opt_state = selconv_jax.reset_rewritten(optimizer, opt_state, variables["params"], report)
    """
    parameters = {
        _keys(path): _Parameter(mask, jnp.shape(parameter), "/".join(_names(path)))
        for (path, parameter), mask in zip(
            jax.tree_util.tree_leaves_with_path(params),
            jax.tree.leaves(rewritten_mask(params, report)),
            strict=True,
        )
    }
    longest = max(map(len, parameters))
    start = optimizer.init(params)
    structure: Any = jax.tree.structure(start)
    if structure != jax.tree.structure(opt_state):
        raise ValueError(
            "the optimizer's state does not match this optimizer and these parameters: "
            "optimizer.init(params) has another structure. Pass the optimizer that created it and the "
            "'params' it was created for."
        )

    # State without a parameter's shape may still hold its entries, flattened or factored. Such state grows
    # when the parameters do and cannot be reset; state that does not grow, such as a step count, is kept.
    grown = jax.eval_shape(optimizer.init, jax.tree.map(_longer, params))

    def reset(path: tuple[Any, ...], value: Any, first: Any, longer: Any) -> Any:
        keys = _keys(path)
        ends = (keys[-length:] for length in range(min(longest, len(keys)), 0, -1))
        owner = next((parameters[end] for end in ends if end in parameters), None)
        if owner and jnp.shape(value) == owner.shape:
            first = replicated(jnp.asarray(first, value.dtype))
            return sharded_as(jnp.where(owner.rewritten, first, replicated(value)), value)
        if owner or jnp.shape(value) != longer.shape:
            name = owner.name if owner else jax.tree_util.keystr(path)
            of_owner = f", the parameter {owner.shape}" if owner else ""
            raise ValueError(
                f"the optimizer's state for {name} has shape {jnp.shape(value)}{of_owner}: it cannot be "
                "reset by channel. Leave the state as it is, or use an optimizer whose state is shaped like "
                "the parameters."
            )
        return value

    return jax.tree_util.tree_map_with_path(reset, opt_state, start, grown)


def _longer(parameter: Any) -> jax.ShapeDtypeStruct:
    """Return the shape of a parameter with one more entry along its first axis."""
    first, *rest = jnp.shape(parameter) or (0,)
    return jax.ShapeDtypeStruct((first + 1, *rest), parameter.dtype)
