"""Traced programs of a network with each layer as one opaque operation, and the operations' signatures."""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from flax.core import meta, unfreeze
from flax.linen.dtypes import canonicalize_dtype
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Primitive  # type: ignore[attr-defined]
from jax.interpreters import batching

from selconv_jax.compaction._network import Compact, NetworkCall, is_layer, is_producer
from selconv_jax.compaction._static_conv import StaticConv, output_shape
from selconv_jax.nn._computation import window_of
from selconv_jax.nn._interception import intercept_calls, relative_path
from selconv_jax.nn._layers import BatchNormReLUConv

Field = tuple[str, ...]  # key of a variable: collection, path of the module, name

# The variables of a layer or another convolution: collection and name.
LAYER_VARIABLES = (
    *(("params", name) for name in ("kernel", "scale", "bias", "shift")),
    *(("batch_stats", name) for name in ("mean", "var")),
    *(("selectivity", name) for name in ("gate", "source")),
)

# A layer, and any other convolution, as one operation. Operands are the input, for a layer its statistics if
# they are known, and the variables. Parameters are the path, the names of the variables, the module's
# attributes, and the output's shape and dtype.
LAYER = Primitive("selconv_layer")
PRODUCER = Primitive("selconv_producer")
# Either of them under a transformation that makes one operation of several layers, such as ``nn.vmap``.
STACKED = Primitive("selconv_stacked")

# Parameters with an entry for each axis, of which the last may be a number of channels.
_PER_AXIS = ("shape", "new_sizes", "padding_config", "start_indices", "limit_indices")
_ADDRESS = re.compile(r"0x[0-9a-f]+")

# Attributes that do not affect how an output is computed from the inputs, or that compaction replaces.
_NOT_COMPARED = ("features", "feature_group_count", "kernel_init", "bias_init", "name", "parent", "layout")


def _output_type(*operands: Any, shape: tuple[int, ...], dtype: Any, **names: Any) -> Any:
    del operands, names
    return jax.core.ShapedArray(shape, dtype)


def _stack(arguments: Any, axes: Any, *, shape: tuple[int, ...], **names: Any) -> tuple[Any, int]:
    size = next(
        argument.shape[axis] for argument, axis in zip(arguments, axes, strict=True) if isinstance(axis, int)
    )
    return STACKED.bind(*arguments, shape=(size, *shape), **names), 0


for _step in (LAYER, PRODUCER, STACKED):
    _step.def_abstract_eval(_output_type)
    batching.primitive_batchers[_step] = _stack


@dataclasses.dataclass(frozen=True)
class Trace:
    """A traced network."""

    program: ClosedJaxpr  # its layers are the operations `LAYER` and `PRODUCER`
    arguments: tuple[Field | None, ...]  # the variable that each argument holds; None: an input
    results: tuple[Field | None, ...]  # the variable that each result updates; None: an output
    groups: dict[str, int]  # number of groups of each layer, by path
    output: Any  # shapes and dtypes of the network's output


def trace_network(
    model: Compact, variables: Mapping[str, Any], call: NetworkCall, train: bool | None
) -> Trace:
    """Trace a call of a network in one of its modes, without computing anything and without dropout."""
    groups: dict[str, int] = {}
    layouts, widths = dict(model.layouts), dict(model.widths)
    is_inside = False  # a producer is being called to infer the shape of its output

    def step(module: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal is_inside
        if isinstance(module, nn.Dropout):
            return without_dropout(module, call, *args, **kwargs)
        path = relative_path(module, ())
        # `Compact` replaces a layer by a `StaticConv`, which is intercepted in turn. A layer without
        # outputs becomes an operation here, as nothing is called in its place.
        layout = layouts.get(path)
        if type(module) is StaticConv or (is_layer(module) and (layout is None or not layout.outputs)):
            groups[path] = module.feature_group_count
            features = module.features if layout is None else layout.outputs
            return _layer_step(module, path, features, *args, **kwargs)
        if is_inside or not is_producer(module) or widths.get(path, module.features) != module.features:
            return call(*args, **kwargs)
        is_inside = True
        try:
            return _producer_step(module, path, *args, **kwargs)
        finally:
            is_inside = False

    def run(variables: Any, inputs: Any) -> Any:
        with intercept_calls(step):
            return call.run(model, variables, inputs, train)

    variables = unfreeze(dict(variables))
    program, (output, changed) = jax.make_jaxpr(run, return_shape=True)(variables, call.inputs)
    return Trace(
        program,
        (*_fields(variables), *(None for _ in jax.tree.leaves(call.inputs))),
        (*(None for _ in jax.tree.leaves(output)), *_fields(unfreeze(changed))),
        groups,
        output,
    )


def inner_programs(equation: Any) -> Iterator[Jaxpr]:
    """Iterate over the programs inside an operation, such as the body of a loop."""
    for parameter in equation.params.values():
        for item in parameter if isinstance(parameter, tuple | list) else (parameter,):
            jaxpr = item.jaxpr if isinstance(item, ClosedJaxpr) else item
            if isinstance(jaxpr, Jaxpr):
                yield jaxpr


def coarsest_step(traces: Iterable[Trace]) -> float:
    """Return the largest machine epsilon among the types that a network computes in."""
    largest, programs = 0.0, [trace.program.jaxpr for trace in traces]
    while programs:
        for equation in programs.pop().eqns:
            programs.extend(inner_programs(equation))
            types = (getattr(variable.aval, "dtype", None) for variable in equation.outvars)
            floating = [each for each in types if each is not None and jnp.issubdtype(each, jnp.floating)]
            largest = max([largest, *(float(jnp.finfo(each).eps) for each in floating)])
    return largest


def without_dropout(module: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a module without dropout; a handler for `intercept_calls`."""
    if isinstance(module, nn.Dropout):
        return args[0] if args else kwargs["inputs"]
    return call(*args, **kwargs)


def _fields(variables: Any) -> list[Field]:
    """List the keys of variables in the order of the leaves of their tree."""
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    return [tuple(str(getattr(key, "key", key)) for key in path) for path, _ in leaves]


def _layer_step(
    layer: BatchNormReLUConv,
    path: str,
    features: int,
    x: jax.Array,
    train: bool | None = None,
    statistics: Any = None,
    deterministic: bool | None = None,
) -> jax.Array:
    del train, deterministic
    dtype = canonicalize_dtype(x, np.zeros((), layer.param_dtype), dtype=layer.dtype)
    shape = (*output_shape(layer, x)[:-1], features)
    if type(layer) is not StaticConv and features:
        expected = (*window_of(layer), x.shape[-1] // layer.feature_group_count, features)
        _check_kernel(path, (layer.variables.get("params") or {}).get("kernel"), expected)
    return _bound(LAYER, layer, path, (x, *(statistics or ())), shape, dtype)


def _check_kernel(path: str, kernel: jax.Array | None, expected: tuple[int, ...]) -> None:
    if kernel is None or kernel.shape != expected:
        found = "there is none" if kernel is None else f"it has shape {kernel.shape}"
        raise ValueError(
            f"layer {path!r} takes a kernel of shape {expected}, but {found}. Pass the variables of this "
            "model and inputs of the shape that it was initialized with."
        )


def _producer_step(module: Any, path: str, inputs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
    alone, x = module.clone(parent=None, name=None), jax.ShapeDtypeStruct(inputs.shape, inputs.dtype)
    # With its other arguments, such as a stem's ``train``: one that the module does not take is an error.
    y, expected = jax.eval_shape(lambda x: alone.init_with_output(jax.random.key(0), x, *args, **kwargs), x)
    kernel = (module.variables.get("params") or {}).get("kernel")
    if kernel is not None:
        _check_kernel(path, kernel, meta.unbox(expected["params"]["kernel"]).shape)
    return _bound(PRODUCER, module, path, (inputs,), y.shape, y.dtype)


def _bound(
    step: Any, module: Any, path: str, inputs: tuple[jax.Array, ...], shape: tuple[int, ...], dtype: Any
) -> jax.Array:
    flat = traverse_util.flatten_dict(unfreeze(dict(module.variables)))
    names = tuple(name for name in LAYER_VARIABLES if name in flat)
    fields = dataclasses.fields(BatchNormReLUConv if isinstance(module, BatchNormReLUConv) else module)
    # Compared as text, including numbers that the network's own code derives from its widths.
    attributes = tuple(
        (field.name, str(getattr(module, field.name))) for field in fields if field.name not in _NOT_COMPARED
    )
    return step.bind(
        *inputs,
        *(flat[name] for name in names),
        path=path,
        names=names,
        attributes=attributes,
        shape=shape,
        dtype=np.dtype(dtype),
    )


def step_signature(equation: Any, any_width: bool) -> tuple[Any, ...]:
    """Describe an operation by its parameters, constants, and the shapes and dtypes of operands and results.

    Signatures are comparable between a network and a smaller one: with ``any_width``, for an operation that
    treats all positions of the last axis alike, the size of this axis is left out.
    """
    operands, parameters = equation.invars, dict(equation.params)
    if equation.primitive in (LAYER, PRODUCER):
        operands = operands[: -len(parameters["names"]) or None]
        del parameters["names"]
    end = -1 if any_width else None
    types = tuple(
        (atom.aval.shape[:end], str(atom.aval.dtype)) if hasattr(atom.aval, "shape") else str(atom.aval)
        for atom in (*operands, *equation.outvars)
    )
    for name in _PER_AXIS if any_width else ():
        if isinstance(value := parameters.get(name), tuple):
            parameters[name] = value[:end]
    # Programs inside an operation are compared as text, without the memory addresses of functions.
    written = _ADDRESS.sub("", repr(sorted(parameters.items())))
    constants = tuple(constant_signature(atom.val) for atom in operands if isinstance(atom, Literal))
    return equation.primitive.name, types, written, constants


def constant_signature(constant: Any) -> Any:
    """Describe a constant array by its shape, dtype and a digest of its value."""
    if isinstance(constant, jax.Array) and jnp.issubdtype(constant.dtype, jax.dtypes.prng_key):
        constant = jax.random.key_data(constant)
    value = np.asarray(constant)
    return value.shape, str(value.dtype), hashlib.sha256(value.tobytes()).hexdigest()
