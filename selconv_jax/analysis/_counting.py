"""Counts of a network's trainable parameters and, from its traced program, multiply-adds (MACs)."""

import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend.core import Jaxpr

from selconv_jax.compaction._trace import inner_programs


def count_parameters(params: Any) -> int:
    """Count trainable parameters.

    Args:
        params: A pytree of arrays or `jax.ShapeDtypeStruct`.

    Example:
        >>> import jax.numpy as jnp
        >>> from selconv_jax.analysis import count_parameters
        >>> count_parameters({"kernel": jnp.ones((3, 3, 4, 8)), "scale": jnp.ones(4)})
        292
    """
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def count_multiply_adds(function: Callable[..., Any], *arguments: Any) -> dict[str, int]:
    """Count the multiply-adds (MACs) of a function's convolutions and matrix products, by module.

    A multiplication and its addition count as one. Taps of a convolution that fall on padding count, as is
    usual, but not those that fall between the pixels of a transposed one's input; batch norms, activations
    and pools do not. The function is only traced, not run. The body of a ``lax.scan`` counts once per
    iteration, that of a ``jax.shard_map`` once per device; of a ``lax.cond`` the most expensive branch
    counts, and the body of a ``lax.while_loop``, whose length is unknown, counts once. A selective network
    includes the products for the copies that its ``capacity`` provides for; ``model.clone(capacity=0.0)``
    counts as the plain one.

    Args:
        function: A function such as ``lambda images: model.apply(variables, images, train=False)``.
        *arguments: Arrays or `jax.ShapeDtypeStruct`.

    Returns:
        Multiply-adds by path, such as ``"DenseNet/block1_layer1/conv1"``; ``""`` for those outside any Flax
        module or `jax.named_scope`.

    Example:
        >>> import jax.numpy as jnp
        >>> from selconv_jax.analysis import count_multiply_adds
        >>> count_multiply_adds(jnp.dot, jnp.ones((2, 3)), jnp.ones((3, 5)))
        {'': 30}
    """
    return dict(_count(jax.make_jaxpr(function)(*arguments).jaxpr, ""))


def _count(jaxpr: Jaxpr, scope: str) -> Counter[str]:
    counts: Counter[str] = Counter()
    for equation in jaxpr.eqns:
        path = "/".join(filter(None, (scope, str(equation.source_info.name_stack))))
        if equation.primitive.name == "dot_general":
            counts[path] += _of_product(equation)
        elif equation.primitive.name == "conv_general_dilated":
            counts[path] += _of_convolution(equation)
        else:
            inner = [_count(part, path) for part in inner_programs(equation)]
            if equation.primitive.name == "cond":
                counts += sorted(inner, key=Counter.total)[-1]
            else:
                times = _times(equation)
                for part in inner:
                    counts += Counter({name: times * number for name, number in part.items()})
    return counts


def _times(equation: Any) -> int:
    """Return how many times an operation runs the programs inside it: a loop, or on several devices."""
    if equation.primitive.name == "scan":
        return int(equation.params["length"])
    if equation.primitive.name != "shard_map":
        return 1
    axes = next(axes for name, axes in equation.params.items() if name.endswith("manual_axes"))
    return math.prod(equation.params["mesh"].shape[axis] for axis in axes)


def _of_product(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _of_convolution(equation: Any) -> int:
    numbers, kernel = equation.params["dimension_numbers"], equation.invars[1].aval.shape
    result = equation.outvars[0].aval.shape
    channels = math.prod(result[axis] for axis in numbers.out_spec[:2]) * kernel[numbers.rhs_spec[1]]
    axes = zip(
        (result[axis] for axis in numbers.out_spec[2:]),
        (kernel[axis] for axis in numbers.rhs_spec[2:]),
        equation.params["window_strides"],
        equation.params["padding"],
        equation.params["lhs_dilation"],
        equation.params["rhs_dilation"],
        strict=True,
    )
    return channels * math.prod(itertools.starmap(_taps, axes))


def _taps(size: int, taps: int, stride: int, padding: tuple[int, int], dilation: int, spacing: int) -> int:
    """Count the taps of a window along an axis, over all its places, except on the zeros between pixels."""
    places = stride * np.arange(size)[:, None] + spacing * np.arange(taps)[None, :] - padding[0]
    return int((places % dilation == 0).sum())
