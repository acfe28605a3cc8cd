"""Batch norms, ReLUs and convolutions of a traced network that together are one layer."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype
from jax.extend.core import Jaxpr, Literal, Primitive
from jax.interpreters import batching

from selconv_jax.compaction._network import NetworkCall
from selconv_jax.compaction._trace import inner_programs
from selconv_jax.nn._interception import intercept_calls, relative_path

# A batch norm, dropout or convolution as one opaque operation; its parameter is the module's path.
_NORM, _DROPOUT, _CONV = (Primitive(f"selconv_{name}") for name in ("norm", "dropout", "conv"))
_STACKED = Primitive("selconv_stacked_module")  # one of them under ``nn.vmap``
# Operations of operations that run them once, with the variables of the whole program.
_TRANSPARENT = ("jit", "pjit", "checkpoint", "remat", "remat2", "closed_call")
_KINDS = {nn.BatchNorm: _NORM, nn.Dropout: _DROPOUT, nn.Conv: _CONV}


def _stack(arguments: Any, axes: Any, *, shape: tuple[int, ...], **names: Any) -> tuple[Any, int]:
    return _STACKED.bind(*arguments, shape=(arguments[0].shape[axes[0]], *shape), **names), 0


for _step in (*_KINDS.values(), _STACKED):
    _step.def_abstract_eval(lambda _, *, shape, dtype, path: jax.core.ShapedArray(shape, dtype))
    batching.primitive_batchers[_step] = _stack


@dataclasses.dataclass(frozen=True)
class Triple:
    """A convolution whose input is the ReLU of a batch norm that nothing else reads.

    Attributes:
        norm: Path of the batch norm.
        conv: Path of the convolution.
        dropout: Path of a dropout between them; None: there is none.
        settings: Arguments of the layer that computes all of it.
    """

    norm: str
    conv: str
    dropout: str | None
    settings: Mapping[str, Any]


def find_triples(
    model: nn.Module, variables: Any, call: NetworkCall, train: bool | None
) -> tuple[dict[str, Triple], dict[str, str]]:
    """Find the triples of a network by tracing a call.

    Args:
        model: The network.
        variables: Its variables, or their shapes.
        call: The call.
        train: One of the modes of the call.

    Returns:
        The triples, and why every other convolution is none; both by the path of the convolution.
    """
    modules: dict[str, nn.Module] = {}
    calls: Counter[str] = Counter()

    def step(module: Any, run: Callable[..., Any], x: Any = None, *args: Any, **kwargs: Any) -> Any:
        # More arguments than the input and mode: a mask or a random key, which no layer takes.
        more = len(args) > 1 or any(kwargs.get(name) is not None for name in ("mask", "rng"))
        if type(module) not in _KINDS or not isinstance(x, jax.Array) or more:
            return run(*([] if x is None else [x]), *args, **kwargs)
        path = relative_path(module, ())
        calls[path] += 1
        # Its name and parent do not survive the trace.
        modules[path] = module.clone(parent=None, name=None)
        # Called beside the operation, for its variables and the type of its output.
        y = x if type(module) is nn.Dropout else run(jnp.zeros_like(x), *args, **kwargs)
        return _KINDS[type(module)].bind(x, path=path, shape=y.shape, dtype=y.dtype)

    def run(variables: Any, inputs: Any) -> Any:
        with intercept_calls(step):
            return call.run(model, variables, inputs, train)[0]  # type: ignore[arg-type]

    program = jax.make_jaxpr(run)(variables, call.inputs).jaxpr
    found: dict[str, Triple] = {}
    left: dict[str, str] = {}
    for path in modules:
        if type(modules[path]) is nn.Conv:
            left[path] = "it is in a loop, or under nn.scan or nn.vmap"
    programs = [program]
    while programs:
        inner = programs.pop()
        for equation in inner.eqns:
            if equation.primitive.name in _TRANSPARENT:
                programs.extend(inner_programs(equation))
            if equation.primitive is not _CONV:
                continue
            path = equation.params["path"]
            triple = _triple(inner, equation, modules, calls)
            if isinstance(triple, Triple):
                found[path] = triple
                del left[path]
            else:
                left[path] = triple
    return found, left


def _triple(program: Jaxpr, conv: Any, modules: Mapping[str, Any], calls: Mapping[str, int]) -> Triple | str:
    """Return the triple of a convolution, or why it is none."""
    makers: dict[Any, Any] = {
        variable: equation for equation in program.eqns for variable in equation.outvars
    }
    uses = Counter(
        variable
        for variables in (*(equation.invars for equation in program.eqns), program.outvars)
        for variable in variables
        if not isinstance(variable, Literal)
    )
    path = conv.params["path"]
    dropout, steps = None, []
    maker = makers.get(conv.invars[0])
    if maker is not None and maker.primitive is _DROPOUT:
        dropout = maker.params["path"]
        steps.append(maker)
        maker = makers.get(maker.invars[0])
    if maker is None or not _is_relu(maker):
        return "its input is not the ReLU of a batch norm"
    steps.append(maker)
    maker = makers.get(next(variable for variable in maker.invars if not isinstance(variable, Literal)))
    if maker is None or maker.primitive is not _NORM:
        return "its input is not the ReLU of a batch norm"
    steps.append(maker)
    norm = maker.params["path"]
    if any(uses[step.outvars[0]] > 1 for step in steps):
        return f"the output of {norm} is read elsewhere, too"
    if calls[path] > 1 or calls[norm] > 1:
        return "it, or its batch norm, is called more than once"
    layer = _settings(modules[norm], modules[path], modules.get(dropout or ""))
    return layer if isinstance(layer, str) else Triple(norm, path, dropout, layer)


def _settings(norm: nn.BatchNorm, conv: nn.Conv, dropout: nn.Dropout | None) -> dict[str, Any] | str:
    """Return the arguments of the layer that computes a triple, or why there is none."""
    if conv.use_bias:
        return "it has a bias; make it with use_bias=False"
    unusual = [
        name
        for name, usual in (
            ("mask", None),
            ("conv_general_dilated", None),
            ("conv_general_dilated_cls", None),
            ("promote_dtype", promote_dtype),
        )
        if getattr(conv, name) is not usual
    ]
    dilation: Any = conv.input_dilation
    if any(size not in (1, None) for size in np.ravel(dilation)):
        unusual.append("input_dilation")
    if unusual:
        return f"{unusual[0]} is set"
    if norm.axis not in (-1, (-1,)) or not (norm.use_scale and norm.use_bias):
        return "its batch norm has another axis than the last, or no scale or bias"
    if norm.axis_index_groups is not None:
        return "its batch norm has axis_index_groups"
    if (norm.dtype, norm.param_dtype) != (conv.dtype, conv.param_dtype):
        return "its batch norm has another dtype or param_dtype"
    names = ("features", "kernel_size", "strides", "padding", "kernel_dilation", "feature_group_count")
    settings = {name: getattr(conv, name) for name in (*names, "dtype", "param_dtype", "precision")}
    settings |= {name: getattr(norm, name) for name in ("momentum", "epsilon", "axis_name")}
    if dropout is not None:
        if dropout.broadcast_dims or dropout.rng_collection != "dropout":
            return "its dropout has broadcast_dims or another rng_collection"
        settings["dropout_rate"] = dropout.rate
    return settings


def _is_relu(equation: Any) -> bool:
    """Check whether an operation, possibly of other operations, is a ReLU of its one argument."""
    variables = [variable for variable in equation.invars if not isinstance(variable, Literal)]
    if len(variables) != 1 or len(equation.outvars) != 1:
        return False
    if equation.primitive.name == "max":
        return any(isinstance(operand, Literal) and operand.val == 0 for operand in equation.invars)
    programs = list(inner_programs(equation))
    if equation.primitive.name.startswith("custom_"):
        # Only `jax.nn.relu`: other functions with a gradient of their own may have another one.
        is_known = equation.primitive.name == "custom_jvp_call" and len(programs) == 1
        if not is_known or programs[0].debug_info.func_name != "relu":
            return False
    return len(programs) == 1 and len(programs[0].eqns) == 1 and _is_relu(programs[0].eqns[0])
