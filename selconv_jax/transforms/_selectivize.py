"""Conversion of a trained plain network's variables to those of its selective twin."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import traverse_util
from flax.core import FrozenDict, freeze, meta, unfreeze

Path = tuple[str, ...]

_SHOWN = 5  # misfits that an error lists


def selectivize(plain: Mapping[str, Any], template: Mapping[str, Any]) -> Any:
    """Convert a trained network's variables to those of its selective twin, which computes exactly the same.

    The twin is the same model with `selconv_jax.SelectiveConv` in place of
    `selconv_jax.BatchNormReLUConv`, or of any module that does batch norm, ReLU and convolution with
    parameters ``kernel``, ``scale``, ``bias`` and statistics ``mean``, ``var``. All variables keep their
    values. The allocation is that of a new layer: every gate open, every channel reading itself, shifts 0.
    The twin can then be trained further and re-allocated.

    A network of ``nn.BatchNorm``, ``nn.relu`` and ``nn.Conv`` has other names of variables;
    `selconv_jax.selectivize_model` converts it as a whole.

    Args:
        plain: The variables of the plain network: ``params``, ``batch_stats`` and any others.
        template: The variables of the selective twin from ``init``, or only their shapes
            (``jax.eval_shape`` of ``init``). Its values are not used.

    Returns:
        The variables of the twin. Arrays of ``plain`` are shared, not copied.

    Raises:
        ValueError: The template has no selective layer, ``plain`` already has selective layers, or the two
            do not match: entries are missing, left over, or of another shape or dtype.

    Example:
        >>> import jax, jax.numpy as jnp, selconv_jax
        >>> x = jnp.ones((1, 8, 8, 16))
        >>> plain = selconv_jax.BatchNormReLUConv(features=4, kernel_size=(3, 3))
        >>> trained = plain.init(jax.random.key(0), x, train=False)
        >>> twin = selconv_jax.SelectiveConv(features=4, kernel_size=(3, 3))
        >>> variables = selconv_jax.selectivize(trained, twin.init(jax.random.key(1), x, train=False))
        >>> bool((plain.apply(trained, x, train=False) == twin.apply(variables, x, train=False)).all())
        True
    """
    wanted = traverse_util.flatten_dict(unfreeze(dict(template)))
    given = traverse_util.flatten_dict(unfreeze(dict(plain)))
    layers = [path[1:-1] for path in wanted if path[0] == "selectivity" and path[-1] == "gate"]
    if not layers:
        raise ValueError(
            "the template has no selective layer: it has no 'gate' in 'selectivity', among the collections "
            f"{sorted(template)}. Pass the variables of a model that has selconv_jax.SelectiveConv layers."
        )
    if any(path[0] == "selectivity" for path in given):
        raise ValueError(
            "the plain variables hold a 'selectivity' collection: the model is selective already. Use its "
            "variables as they are."
        )
    new = {}
    for layer in layers:
        gate = ("selectivity", *layer, "gate")
        new[gate] = jnp.ones(wanted[gate].shape, bool)
        source, shift = ("selectivity", *layer, "source"), ("params", *layer, "shift")
        if source in wanted and shift in wanted:  # else the layer is gate-only
            new[source] = jnp.full(wanted[source].shape, -1, jnp.int32)
            new[shift] = jnp.zeros(wanted[shift].shape, wanted[shift].dtype)
    _check_fit({path: leaf for path, leaf in wanted.items() if path not in new}, given)
    variables = traverse_util.unflatten_dict({**given, **new})
    return freeze(variables) if isinstance(plain, FrozenDict) else variables


def _check_fit(wanted: dict[Path, Any], given: dict[Path, Any]) -> None:
    """Raise a ValueError unless the plain variables match the template entry by entry."""
    misfits = [f"missing: {_name(path)}" for path in wanted if path not in given]
    misfits += [f"left over: {_name(path)}" for path in given if path not in wanted]
    misfits += [
        f"{_name(path)} is {_kind(given[path])}, expected {_kind(leaf)}"
        for path, leaf in wanted.items()
        if path in given and _kind(given[path]) != _kind(leaf)
    ]
    if misfits:
        listed = "; ".join(misfits[:_SHOWN])
        more = f"; and {len(misfits) - _SHOWN} more" if len(misfits) > _SHOWN else ""
        raise ValueError(
            f"{len(misfits)} of the plain variables do not fit the selective model: {listed}{more}. Build "
            "both models with the same arguments and layer names."
        )


def _name(path: Path) -> str:
    return "/".join(map(str, path))


def _kind(leaf: Any) -> str:
    """Return the dtype and shape of an array, boxed or not, or the type name of anything else."""
    leaf = meta.unbox(leaf)
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return f"{leaf.dtype}{list(leaf.shape)}"
    return type(leaf).__name__
