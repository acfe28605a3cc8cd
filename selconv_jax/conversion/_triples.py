"""Batch norms, ReLUs and convolutions of a traced network that together are one layer."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Collection, Mapping
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
from selconv_jax.nn._computation import window_of
from selconv_jax.nn._interception import intercept_calls, scope_path

# A batch norm, dropout or convolution as one opaque operation. Operands are the input and variables,
# parameters the module's path, the number of the call among those of the module, and the type of the output.
_NORM, _DROPOUT, _CONV = (Primitive(f"selconv_{name}") for name in ("norm", "dropout", "conv"))
_STACKED = Primitive("selconv_stacked_module")  # one of them under ``nn.vmap``
# Operations made of others, which they run once, with the variables of the whole program.
_TRANSPARENT = ("jit", "pjit", "checkpoint", "remat", "remat2", "closed_call")
_KINDS = {nn.BatchNorm: _NORM, nn.Dropout: _DROPOUT, nn.Conv: _CONV}


def _stack(arguments: Any, axes: Any, *, shape: tuple[int, ...], **names: Any) -> tuple[Any, int]:
    size = next(
        argument.shape[axis] for argument, axis in zip(arguments, axes, strict=True) if isinstance(axis, int)
    )
    return _STACKED.bind(*arguments, shape=(size, *shape), **names), 0


for _step in (*_KINDS.values(), _STACKED):
    _step.def_abstract_eval(lambda *_, shape, dtype, path, call: jax.core.ShapedArray(shape, dtype))
    batching.primitive_batchers[_step] = _stack


@dataclasses.dataclass(frozen=True)
class DropoutCall:
    """A call of a dropout between a batch norm and a convolution; other calls of it may be elsewhere.

    Attributes:
        path: Path of the dropout.
        number: Number of its calls from that of the batch norm up to this one, which is not counted.
    """

    path: str
    number: int


@dataclasses.dataclass(frozen=True)
class Triple:
    """A convolution whose input is the ReLU of a batch norm that nothing else reads.

    Attributes:
        norm: Path of the batch norm.
        conv: Path of the convolution.
        dropout: The dropout between them; None: there is none.
        settings: Arguments of the layer that computes all of it.
    """

    norm: str
    conv: str
    dropout: DropoutCall | None
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
    before: dict[str, Counter[str]] = {}  # the numbers of calls before that of each
    left: dict[str, str] = {}
    slashed: set[str] = set()  # paths of which a name contains the separator

    def step(module: Any, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        kind = type(module)
        if kind not in _KINDS:
            return run(*args, **kwargs)
        names = scope_path(module)
        path = "/".join(names)
        before[path] = calls.copy()
        calls[path] += 1
        # Its name and parent do not survive the trace.
        modules[path] = module.clone(parent=None, name=None)
        if kind is nn.Conv:
            left[path] = "it is in a loop, or under nn.scan or nn.vmap"
        if any("/" in name for name in names):
            slashed.add(path)
        x, *more = args or (kwargs.pop("x" if kind is nn.BatchNorm else "inputs", None),)
        # More arguments than the input and mode: a mask or a random key, which no layer takes.
        is_more = len(more) > 1 or any(kwargs.get(name) is not None for name in ("mask", "rng"))
        if is_more or not isinstance(x, jax.Array | np.ndarray):
            return run(*([] if x is None else [x]), *more, **kwargs)
        read = jax.tree.leaves([module.variables.get(name) for name in ("params", "batch_stats")])
        # Called beside the operation, for its variables and the type of its output.
        y = x if kind is nn.Dropout else run(jnp.zeros_like(x), *more, **kwargs)
        return _KINDS[kind].bind(x, *read, path=path, call=calls[path], shape=y.shape, dtype=y.dtype)

    def run(variables: Any, inputs: Any) -> Any:
        with intercept_calls(step):
            return call.run(model, variables, inputs, train, is_recorded=True)

    program = jax.make_jaxpr(run)(variables, call.inputs).jaxpr
    found: dict[str, Triple] = {}
    # With their arguments that are arguments of the whole program.
    programs = [(program, set(program.invars))]
    while programs:
        inner, given = programs.pop()
        for equation in inner.eqns:
            if equation.primitive.name in _TRANSPARENT:
                for body in inner_programs(equation):
                    pairs = zip(equation.invars, body.invars, strict=True)
                    programs.append((body, {own for outer, own in pairs if _is_in(outer, given)}))
            if equation.primitive is not _CONV:
                continue
            path = equation.params["path"]
            triple = _triple(inner, equation, modules, calls, before, given)
            if isinstance(triple, Triple) and slashed & {path, triple.norm}:
                triple = "rename it or its batch norm: no name on their paths may contain '/'"
            if isinstance(triple, Triple):
                found[path] = triple
                del left[path]
            else:
                left[path] = triple
    return found, left


def _triple(
    program: Jaxpr,
    conv: Any,
    modules: Mapping[str, Any],
    calls: Mapping[str, int],
    before: Mapping[str, Mapping[str, int]],
    given: Collection[Any],
) -> Triple | str:
    """Return the triple of a convolution, or why it is none; ``given`` are the variables of the network."""
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
        dropout = maker.params
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
    if not all(_is_in(variable, given) for step in (maker, conv) for variable in step.invars[1:]):
        return (
            "its parameters, or its batch norm's, are computed from others (nn.WeightNorm, nn.map_variables)"
        )
    rank, window = len(conv.invars[0].aval.shape), window_of(modules[path])
    if rank != len(window) + 2:
        return f"its input has {rank} axes; a layer takes one of the batch, {len(window)} and the channels"
    dtype, own = maker.invars[0].aval.dtype, modules[norm].dtype
    if own is not None and dtype != own and dtype.itemsize >= np.dtype(own).itemsize:
        return f"its batch norm normalizes in the {dtype} of its input; a layer would in {np.dtype(own)}"
    between = None
    if dropout is not None:
        between = DropoutCall(dropout["path"], dropout["call"] - 1 - before[norm].get(dropout["path"], 0))
    layer = _settings(modules[norm], modules[path], modules[between.path] if between else None)
    return layer if isinstance(layer, str) else Triple(norm, path, between, layer)


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


def _is_in(atom: Any, variables: Collection[Any]) -> bool:
    """Check whether an operand is one of some variables; constants are none."""
    return not isinstance(atom, Literal) and atom in variables


def _is_relu(equation: Any) -> bool:
    """Check whether an operation, possibly made of others, is a ReLU of its one argument."""
    variables = [variable for variable in equation.invars if not isinstance(variable, Literal)]
    if len(variables) != 1 or len(equation.outvars) != 1:
        return False
    if equation.primitive.name == "max":
        return any(isinstance(operand, Literal) and operand.val == 0 for operand in equation.invars)
    programs = list(inner_programs(equation))
    if equation.primitive.name.startswith("custom_"):
        # Only `jax.nn.relu`: other functions with a gradient of their own may have another one.
        is_known = equation.primitive.name == "custom_jvp_call" and len(programs) == 1
        if not is_known or programs[0].debug_info.func_src_info != _source_of_relu():
            return False
    return len(programs) == 1 and len(programs[0].eqns) == 1 and _is_relu(programs[0].eqns[0])


@functools.cache
def _source_of_relu() -> str | None:
    """Return the name and place of `jax.nn.relu` in the traces of its calls."""
    call = jax.make_jaxpr(jax.nn.relu)(jax.ShapeDtypeStruct((), np.float32)).eqns[0]
    return next(inner_programs(call)).debug_info.func_src_info
