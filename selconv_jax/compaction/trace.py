"""A network's program with each of its layers as one opaque step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.linen.dtypes import canonicalize_dtype
from jax.extend.core import ClosedJaxpr, Primitive  # type: ignore[attr-defined]
from jax.interpreters import batching

from selconv_jax.compaction.module import Compact, intercept_calls, is_layer, is_producer, relative_path
from selconv_jax.compaction.static_layer import StaticConv, output_shape
from selconv_jax.layers import PlainConv

__all__ = ["LAYER", "PRODUCER", "STACKED", "Trace", "trace_network"]

# A layer as one step from its input to its output; the other arguments are its path and the output's type.
LAYER = Primitive("selconv_layer")
# The output of another convolution: the same array, marked with the path.
PRODUCER = Primitive("selconv_producer")
# Either of them under a transformation, such as ``nn.vmap``, that makes one step of several layers.
STACKED = Primitive("selconv_stacked")


def _layer_type(x: Any, *, path: str, shape: tuple[int, ...], dtype: Any) -> Any:
    del x, path
    return jax.core.ShapedArray(shape, dtype)


def _stacked_type(x: Any, *, path: str, shape: tuple[int, ...], dtype: Any) -> Any:
    del x, path
    return jax.core.ShapedArray(shape, dtype)


def _producer_type(y: Any, *, path: str) -> Any:
    del path
    return jax.core.ShapedArray(y.shape, y.dtype)


def _stack_layers(
    arguments: Any, axes: Any, *, path: str, shape: tuple[int, ...], dtype: Any
) -> tuple[Any, int]:
    size = arguments[0].shape[axes[0]]
    return STACKED.bind(arguments[0], path=path, shape=(size, *shape), dtype=dtype), 0


def _stack_producers(arguments: Any, axes: Any, *, path: str) -> tuple[Any, int]:
    y = arguments[0]
    return STACKED.bind(y, path=path, shape=y.shape, dtype=y.dtype), axes[0]


LAYER.def_abstract_eval(_layer_type)
PRODUCER.def_abstract_eval(_producer_type)
STACKED.def_abstract_eval(_stacked_type)
batching.primitive_batchers[STACKED] = _stack_layers
batching.primitive_batchers[LAYER] = _stack_layers
batching.primitive_batchers[PRODUCER] = _stack_producers


@dataclasses.dataclass(frozen=True)
class Trace:
    """A traced network.

    Attributes:
        program: The program; its layers are steps `LAYER` and `PRODUCER`.
        layers: The modules of the layers, by path; their variables are not to be read.
        output: Shapes and dtypes of what the network returns.
    """

    program: ClosedJaxpr
    layers: dict[str, PlainConv]
    output: Any


def trace_network(model: nn.Module, variables: Any, example: Any) -> Trace:
    """Traces ``model.apply(variables, example, train=False)``; nothing is computed.

    Args:
        model: The network.
        variables: Its variables, or their shapes.
        example: An input, or its shape.

    Returns:
        The program and its layers.
    """
    layers: dict[str, PlainConv] = {}
    layouts = dict(model.layouts) if isinstance(model, Compact) else {}

    def step(module: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        path = relative_path(module, ())
        # A layer of a compacted network becomes a `StaticConv` first, or nothing if it has no outputs.
        layout = layouts.get(path)
        if type(module) is StaticConv or (is_layer(module) and (layout is None or not layout.outputs)):
            layers[path] = module
            features = module.features if layout is None else layout.outputs
            return _as_step(module, path, features, *args, **kwargs)
        y = call(*args, **kwargs)
        if is_producer(module) and y.shape[-1] == module.features:
            y = PRODUCER.bind(y, path=path)
        return y

    apply: Callable[..., Any] = model.apply

    def run(variables: Any, example: Any) -> Any:
        with intercept_calls(step):
            return apply(variables, example, train=False)

    program, output = jax.make_jaxpr(run, return_shape=True)(variables, example)
    return Trace(program, layers, output)


def _as_step(
    layer: PlainConv, path: str, features: int, x: jax.Array, train: bool, statistics: Any = None
) -> jax.Array:
    del train, statistics  # neither has an effect when evaluating
    dtype = canonicalize_dtype(x, np.zeros((), layer.param_dtype), dtype=layer.dtype)
    shape = (*output_shape(layer, x)[:-1], features)
    step: jax.Array = LAYER.bind(x, path=path, shape=shape, dtype=dtype)
    return step
