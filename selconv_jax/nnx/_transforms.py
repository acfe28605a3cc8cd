"""The transforms of variables, as in-place updates of NNX modules."""

from typing import Any

import jax
from flax import nnx

from selconv_jax.nnx._layers import SelectiveConv
from selconv_jax.nnx._linen_module import LinenModule
from selconv_jax.nnx._variables import linen_variables, update_module
from selconv_jax.transforms import _optimizer_state, _reallocation, _selectivize
from selconv_jax.transforms._capacity import fitted_capacities, with_capacity
from selconv_jax.transforms._report import Report
from selconv_jax.transforms._rule import Rule


def reallocate(module: nnx.Module, key: jax.Array, rule: Rule = None) -> Report:
    """Re-allocate the channels of every selective layer of a module, in place.

    One round of `selconv_jax.reallocate` on the module's variables; see there for the details. Layers are
    found in modules, lists and dictionaries at any depth, and may also be Linen ones in ``nnx.bridge.ToNNX``.
    It may be called under ``nnx.jit``.

    Args:
        module: The module.
        key: A PRNG key.
        rule: Settings of the round, or a function that returns those of a layer by its path.

    Returns:
        The report of the round; a layer's path is that of its attributes, such as ``blocks/0/conv``.

    Raises:
        ValueError: The module has no selective layer, or its arrays are inconsistent.

    Example:
        >>> import jax, selconv_jax
        >>> from flax import nnx
        >>> layer = selconv_jax.nnx.SelectiveConv(16, 4, (3, 3), rngs=nnx.Rngs(0))
        >>> report = selconv_jax.nnx.reallocate(
        ...     layer, jax.random.key(0), selconv_jax.AllocationRule(threshold=0.1))
        >>> int((layer.source[...] >= 0).sum()) == report.reallocated > 0
        True
    """
    variables, report = _reallocation.reallocate(linen_variables(module), key, rule)
    update_module(module, variables)
    return report


def reset_rewritten(optimizer: nnx.Optimizer[Any], module: nnx.Module, report: Report) -> None:
    """Reinitialize, in place, the optimizer state of the parameter entries that re-allocation rewrote.

    See `selconv_jax.reset_rewritten`.

    Args:
        optimizer: The optimizer of the module.
        module: The module.
        report: What `reallocate` returned.

    Raises:
        ValueError: The optimizer is not one of this module's parameters, or a part of its state does not
            have one entry per parameter entry (such as factored second moments).

    Example:
        >>> import jax, jax.numpy as jnp, optax, selconv_jax
        >>> from flax import nnx
        >>> layer = selconv_jax.nnx.SelectiveConv(16, 4, (3, 3), rngs=nnx.Rngs(0))
        >>> optimizer = nnx.Optimizer(layer, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)
        >>> gradient = jax.tree.map(jnp.ones_like, nnx.state(layer, nnx.Param))
        >>> _ = optimizer.update(layer, gradient)
        >>> rule = selconv_jax.AllocationRule(threshold=0.1)
        >>> report = selconv_jax.nnx.reallocate(layer, jax.random.key(0), rule)
        >>> selconv_jax.nnx.reset_rewritten(optimizer, layer, report)
        >>> momentum = optimizer.opt_state[0].trace["scale"][...]
        >>> int((momentum == 0).sum()) == report.reallocated
        True
    """
    params = nnx.as_pure(nnx.state(module, optimizer.wrt))
    state = nnx.as_pure(optimizer.opt_state)
    new = _optimizer_state.reset_rewritten(optimizer.tx, state, params, report)
    nnx.update(optimizer.opt_state, nnx.state(new))


def selectivize(plain: nnx.Module, selective: nnx.Module) -> None:
    """Give a selective module, in place, the variables, and so the function, of a trained plain one.

    See `selconv_jax.selectivize`.

    Args:
        plain: The trained module.
        selective: The same module with `SelectiveConv` in place of `BatchNormReLUConv`; its values are lost.

    Raises:
        ValueError: The modules do not match.

    Example:
        >>> import jax.numpy as jnp, selconv_jax
        >>> from flax import nnx
        >>> plain = selconv_jax.nnx.BatchNormReLUConv(16, 4, (3, 3), rngs=nnx.Rngs(0))
        >>> selective = selconv_jax.nnx.SelectiveConv(16, 4, (3, 3), rngs=nnx.Rngs(1))
        >>> selconv_jax.nnx.selectivize(plain, selective)
        >>> x = jnp.ones((1, 8, 8, 16))
        >>> bool((plain(x) == selective(x)).all())
        True
    """
    update_module(selective, _selectivize.selectivize(linen_variables(plain), linen_variables(selective)))


def fit_capacity(module: nnx.Module, steps: int = 8) -> None:
    """Set, in place, the capacity of every selective layer of a module to just what its copies need.

    See `selconv_jax.with_capacity`. Call it after each round; what ``nnx.jit`` has compiled for other
    capacities is recompiled. Layers inside a `LinenModule` or ``nnx.bridge.ToNNX`` are included.

    Args:
        module: The module.
        steps: Capacities are rounded up to multiples of ``1 / steps``.

    Raises:
        ValueError: There is no selective layer, or its arrays are inconsistent.

    Example:
        >>> import selconv_jax
        >>> from flax import nnx
        >>> layer = selconv_jax.nnx.SelectiveConv(16, 4, (3, 3), rngs=nnx.Rngs(0))
        >>> selconv_jax.nnx.fit_capacity(layer)
        >>> layer.capacity
        0.0
    """
    capacities = fitted_capacities(module, steps)
    for path, part in nnx.iter_modules(module):
        if isinstance(part, SelectiveConv):
            part.capacity = capacities.get("/".join(map(str, path)), part.capacity)
        elif isinstance(part, LinenModule) and "selectivity" in part.variables():
            part.model = with_capacity(part.model, part.variables(), steps)
        elif isinstance(part, nnx.bridge.ToNNX) and "selectivity" in linen_variables(part):
            part.to_nnx__module = with_capacity(part.to_nnx__module, linen_variables(part), steps)
