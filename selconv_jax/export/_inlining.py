"""Functions reduced to primitives that converters to other formats know."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend.core import Jaxpr, Literal

_CALLS = ("jit", "pjit", "closed_call", "checkpoint", "custom_jvp_call", "custom_vjp_call")
_IDENTITIES = ("optimization_barrier", "stop_gradient")


def inlined(function: Callable[..., Any], shapes: Sequence[jax.ShapeDtypeStruct]) -> Callable[..., list[Any]]:
    """Trace a function, and return one that computes the same function by single primitives.

    Calls are replaced by what they call, and barriers are left out. So a converter that follows JAX's
    versions late, or replaces functions of `jax.numpy` while it traces, meets neither.

    Args:
        function: The function.
        shapes: Its inputs.

    Returns:
        A function of the same inputs; returns a list of all output arrays.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> shape = jax.ShapeDtypeStruct((3,), jnp.float32)
        >>> relu = inlined(jax.nn.relu, [shape])
        >>> [str(equation.primitive) for equation in jax.make_jaxpr(relu)(shape).eqns]
        ['max']
    """
    closed = jax.make_jaxpr(function)(*shapes)
    return lambda *inputs: _evaluate(closed.jaxpr, closed.consts, inputs)


def _evaluate(jaxpr: Jaxpr, consts: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))

    def value_of(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        arguments = [value_of(atom) for atom in equation.invars]
        results = _results(equation, arguments)
        values.update(zip(equation.outvars, results, strict=True))
    return [value_of(atom) for atom in jaxpr.outvars]


def _results(equation: Any, arguments: list[Any]) -> Sequence[Any]:
    name, params = equation.primitive.name, equation.params
    if name in _IDENTITIES:
        return arguments
    if name in _CALLS:
        inner = params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"]
        return _evaluate(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), arguments)
    if name == "pad" and all(min(amounts) >= 0 and not amounts[2] for amounts in params["padding_config"]):
        x, value = arguments
        return [_padded(x, value, params["padding_config"])]
    if name == "unstack":
        (x,), axis = arguments, params["axis"]
        return [lax.index_in_dim(x, index, axis, keepdims=False) for index in range(x.shape[axis])]
    results = equation.primitive.bind(*arguments, **params)
    return results if equation.primitive.multiple_results else [results]


def _padded(x: Any, value: Any, config: Sequence[tuple[int, int, int]]) -> Any:
    """Pad by concatenation: converters know pads only of arrays without a symbolic axis."""
    for axis, (low, high, _) in enumerate(config):
        shapes = [(*x.shape[:axis], amount, *x.shape[axis + 1 :]) for amount in (low, high)]
        before, after = (lax.full(shape, value, x.dtype) for shape in shapes)
        parts = [part for part, amount in ((before, low), (x, 1), (after, high)) if amount]
        x = lax.concatenate(parts, axis) if len(parts) > 1 else x
    return x
