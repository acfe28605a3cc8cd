"""What becomes of the optimizer's memory of the entries that re-allocation rewrote."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from selconv_jax.groups import kernel_rows
from selconv_jax.transform import Report

__all__ = ["reset_rewritten", "rewritten_mask"]


def rewritten_mask(params: Mapping[str, Any], report: Report) -> Any:
    """Which entries of the parameters a round of re-allocation rewrote.

    Args:
        params: The model's ``params``.
        report: What `selconv_jax.reallocate` returned.

    Returns:
        A tree like ``params`` of bool arrays that broadcast against them: kernel ``[*1, C, 1]`` (with
        groups ``[*1, C / G, O]``), scale and bias ``[C]``, shift ``[C, 1]`` of the re-allocated channels,
        all after the axes of a stack of layers; a scalar false for everything else.

    Raises:
        ValueError: ``params`` has no kernel for a layer of the report: they belong to different models.
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

    masks = jax.tree_util.tree_map_with_path(mask, params)
    if missing := sorted(set(report.layers) - kernels):
        raise ValueError(
            f"params has no kernel for selective layer {missing[0]!r}, which the report is about. Pass the "
            "'params' of the model that was re-allocated."
        )
    return masks


def _names(path: tuple[Any, ...]) -> list[str]:
    """The keys of a leaf's path, without the attribute of a box around the leaf (as in Flax NNX)."""
    keys = [key for key in path if not isinstance(key, jax.tree_util.GetAttrKey)]
    return jax.tree_util.keystr(tuple(keys), simple=True, separator="/").split("/")


def reset_rewritten(
    optimizer: optax.GradientTransformation, opt_state: Any, params: Mapping[str, Any], report: Report
) -> Any:
    """Sets the optimizer's state to 0 for the parameter entries that re-allocation rewrote.

    The published method leaves the momentum of a filled slot as it was under the channel's old
    meaning; not calling this function does the same. Calling it makes a slot start from rest.

    The state is edited by its tree structure: every part of it that is shaped like the parameters
    (momentum, first and second moments, accumulated gradients) is reset. It is not meant for optimizers that
    keep averages or iterates of the parameters themselves, which would be set to 0 as well.

    Args:
        optimizer: The optax optimizer that made ``opt_state``.
        opt_state: Its state.
        params: The model's ``params``.
        report: What `selconv_jax.reallocate` returned.

    Returns:
        The state with the same structure, shapes and dtypes.

    Raises:
        ValueError: The optimizer keeps state per parameter that is not shaped like the parameter (such
            as factored second moments), so that entries cannot be told apart.

    Example:
        >>> import jax, jax.numpy as jnp, optax, selconv_jax
        >>> layer = selconv_jax.SelectiveConv(features=4, kernel_size=(3, 3))
        >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 8, 8, 16)), train=False)
        >>> optimizer = optax.sgd(0.1, momentum=0.9)
        >>> opt_state = optimizer.init(variables["params"])
        >>> variables, report = selconv_jax.reallocate(variables, jax.random.key(1))
        >>> opt_state = selconv_jax.reset_rewritten(optimizer, opt_state, variables["params"], report)
    """
    masks = rewritten_mask(params, report)
    names = jax.tree_util.tree_map_with_path(lambda path, _: "/".join(_names(path)), params)

    def is_masked(value: Any) -> bool:
        return isinstance(value, optax.MaskedNode)  # stands for a parameter that is left out

    def reset(value: Any, parameter: Any, mask: jax.Array, name: str) -> Any:
        if is_masked(value):
            return value
        if value.shape != parameter.shape:
            raise ValueError(
                f"the optimizer's state for {name} has shape {value.shape}, the parameter {parameter.shape}: "
                "it cannot be reset by channel. Leave the state as it is, or use an optimizer whose state "
                "is shaped like the parameters."
            )
        return jnp.where(mask, jnp.zeros((), value.dtype), value)

    try:
        return optax.tree.map_params(optimizer, reset, opt_state, params, masks, names, is_leaf=is_masked)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(
            f"the state of this optimizer cannot be matched with the parameters ({error}). Leave it as it is."
        ) from error
