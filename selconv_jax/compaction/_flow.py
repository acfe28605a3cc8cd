"""Channel flow through a traced network: the channel of a layer that each array position holds."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal  # type: ignore[attr-defined]
from numpy.typing import NDArray

from selconv_jax.compaction._network import path_parts
from selconv_jax.compaction._trace import (
    LAYER,
    PRODUCER,
    STACKED,
    Field,
    Trace,
    constant_signature,
    inner_programs,
    step_signature,
)

Ids = NDArray[np.int64]

# Abstract value of an array: the id of the channel at each position of its last axis; `_UNIFORM` if all
# these positions hold the same, so that it meets any number of channels; the `Field` of a variable that is
# not changed yet; or None, for images, results of unknown operations and values computed from variables.
_UNIFORM = "uniform"
_Value = Ids | str | Field | None

# Elementwise operations. Arrays that are operands of the same one must keep the same positions.
_ELEMENTWISE = """
    abs add add_any and atan2 cbrt ceil clamp convert_element_type copy copy_p cos cosh div eq erf erf_inv
    erfc exp exp2 expm1 floor ge gt integer_pow is_finite le log log1p logistic lt max min mul name ne neg
    nextafter not or pow reduce_precision rem round rsqrt select_n sharding_constraint sign sin sinh sqrt
    square stop_gradient sub tan tanh xor
""".split()  # noqa: SIM905
_CALLS = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2")
_CUSTOM_CALLS = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
_REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or")
_POOLS = ("reduce_window_sum", "reduce_window_max", "reduce_window_min")


@dataclasses.dataclass(frozen=True)
class Flow:
    """Channels, numbered by ids, and the arrays and layers that they reach."""

    outputs: dict[str, Ids]  # [O], output channels of each layer or other convolution, by path
    inputs: dict[str, Ids]  # [C], input channels of each layer, by path, in the order of the program
    classes: Ids  # [ids], the class of each id: the ids of a class are kept or removed together
    needed: NDArray[np.bool_]  # [ids], that an operation other than a layer needs, or the network returns
    labels: list[tuple[Any, ...]]  # [ids], names that are comparable with the trace of a smaller network
    # Layers that must not be changed: those inside loops, branches and stacks, and those with variables that
    # are read elsewhere or computed from others.
    fixed: frozenset[str]
    arrays: list[Ids]  # every array of channels, in the order of the program
    signature: list[Any]  # all operations with their parameters; a smaller network must have the same


def channel_flow(traces: Sequence[Trace]) -> Flow:
    """Follow the channels of a traced network from the layers that compute them to all their readers.

    Concatenations join channels, sums tie them together, paddings add channels of zeros; pools, casts,
    activations and other operations that treat all channels alike pass them on. Any other operation needs
    all of its operands, and its results are not tracked. The traces are those of one network in all its
    modes: a channel that one of them needs is needed.
    """
    walk = _Walk()
    for trace in traces:
        walk.follow(trace)
    classes = np.array([walk.class_of(number) for number in range(len(walk.parents))], np.int64)
    needed = np.zeros(len(classes), bool)
    needed[walk.needed] = True
    return Flow(
        outputs=walk.outputs,
        inputs=walk.inputs,
        classes=classes,
        needed=needed,
        labels=walk.labels,
        fixed=frozenset(walk.fixed | {path for field, path in walk.owners if field in walk.read}),
        arrays=walk.arrays,
        signature=walk.signature,
    )


class _Walk:
    """State of one abstract interpretation of a network's programs.

    Classes are a union-find forest: ``parents[id]`` leads to the representative of the id's class. Arrays
    are numbered in program order, so the same program with fewer channels gets the same labels.
    """

    def __init__(self) -> None:
        self.parents: list[int] = []
        self.labels: list[tuple[Any, ...]] = []
        self.needed: list[int] = []
        self.outputs: dict[str, Ids] = {}
        self.inputs: dict[str, Ids] = {}
        self.fixed: set[str] = set()
        self.read: set[Field] = set()
        self.owners: set[tuple[Field, str]] = set()
        self.arrays: list[Ids] = []
        self.signature: list[Any] = []
        self._allocations = 0

    def follow(self, trace: Trace) -> None:
        """Follow one program; a layer that is also in an earlier one keeps the ids it has there."""
        values = self._run(trace.program.jaxpr, trace.program.consts, list(trace.arguments))
        for value, field in zip(values, trace.results, strict=True):
            # A variable that is returned unchanged is not read.
            if not isinstance(value, tuple) or value != field:
                self._need(value)

    def class_of(self, number: int) -> int:
        """Return the representative of an id's class."""
        while self.parents[number] != number:
            self.parents[number] = self.parents[self.parents[number]]  # path halving
            number = self.parents[number]
        return number

    def _run(self, jaxpr: Jaxpr, constants: Sequence[Any], arguments: Sequence[_Value]) -> list[_Value]:
        """Interpret a program: return the abstract values of its outputs, given those of its arguments."""
        known: dict[Any, _Value] = dict(zip(jaxpr.invars, arguments, strict=True))
        known.update(dict.fromkeys(jaxpr.constvars))
        self.signature.extend(constant_signature(constant) for constant in constants)

        def value(atom: Any) -> _Value:
            # A scalar or single channel broadcasts, whatever its value, to the same at every position.
            found = None if isinstance(atom, Literal) else known[atom]
            return _UNIFORM if found is None and atom.aval.shape[-1:] in ((), (1,)) else found

        for equation in jaxpr.eqns:
            values = [value(atom) for atom in equation.invars]
            if (inner := _called_once(equation)) is not None:
                self.signature.append(equation.primitive.name)
                results = self._run(*inner, values)
            else:
                passed = self._passed(equation, values)
                self.signature.append(step_signature(equation, any_width=passed is not None))
                results = self._read_whole(equation, values) if passed is None else passed
                self.arrays.extend(result for result in results if isinstance(result, np.ndarray))
            known.update(zip(equation.outvars, results, strict=True))
        return [value(atom) for atom in jaxpr.outvars]

    def _need(self, value: _Value) -> None:
        """Record that the whole array is read."""
        if isinstance(value, np.ndarray):
            self.needed.extend(value.tolist())
        elif isinstance(value, tuple):
            self.read.add(value)

    def _new(self, count: int, origin: tuple[Any, ...] | None = None, positions: bool = True) -> Ids:
        self._allocations += origin is None
        origin = origin or ("array", self._allocations)
        first = len(self.parents)
        self.parents.extend(range(first, first + count))
        self.labels.extend((*origin, position if positions else 0) for position in range(count))
        return np.arange(first, first + count)

    def _tie(self, one: Ids, other: Ids) -> None:
        for left, right in zip(one.tolist(), other.tolist(), strict=True):
            self.parents[self.class_of(right)] = self.class_of(left)

    def _passed(self, equation: Any, values: list[_Value]) -> list[_Value] | None:
        """Return the results of an operation that treats all channels alike; None: not known to do so."""
        name = equation.primitive.name
        if equation.primitive in (LAYER, PRODUCER):
            return [self._layer(equation, values)]
        if name == "optimization_barrier":
            return values
        if name in _ELEMENTWISE:
            result = self._elementwise(equation, values)
        elif name == "reduce" and equation.invars[0].aval.ndim - 1 not in equation.params["dimensions"]:
            # It reduces several arrays together, position by position, so they must keep the same positions.
            result = self._elementwise(equation, values)
            return None if result is None else [result] * len(equation.outvars)
        elif name == "concatenate":
            result = self._concatenate(equation, values)
        elif name == "pad" and isinstance(values[0], np.ndarray):
            result = self._pad(values[0], equation.params["padding_config"][-1])
        elif name == "broadcast_in_dim":
            result = self._broadcast(equation, values[0])
        elif isinstance(values[0] if values else None, np.ndarray) and _keeps_channels(equation):
            result = values[0]
        else:
            return None
        return None if result is None else [result]

    def _read_whole(self, equation: Any, values: list[_Value]) -> list[_Value]:
        """Return the untracked results of any other operation, which needs all of its operands."""
        for value in values:
            self._need(value)
        self.fixed.update(_inner_layers(equation))
        return [None] * len(equation.outvars)

    def _layer(self, equation: Any, values: list[_Value]) -> Ids:
        path, count = equation.params["path"], len(values) - len(equation.params["names"])
        (value, *statistics), variables = values[:count], values[count:]
        own = [(collection, *path_parts(path), name) for collection, name in equation.params["names"]]
        self.owners.update((field, path) for field in own)
        # Compaction slices a layer's variables, which is only valid if the layer reads them as they are, not
        # computed from others (a normalized kernel) or taken from another layer (a tied one). Variables of
        # this layer that something else reads are found at the end of the pass, through `owners`.
        if [variable if isinstance(variable, tuple) else None for variable in variables] != own:
            self.fixed.add(path)
            for variable in variables:
                self._need(variable)
        if not isinstance(value, np.ndarray):
            value = self._new(equation.invars[0].aval.shape[-1])
            self._need(value)
        for known in statistics:  # one value per input channel, removed with the channel
            if isinstance(known, np.ndarray):
                self._tie(value, known)
            else:
                self._need(known)
                self._need(value)
        if equation.primitive is PRODUCER:
            self._need(value)
        else:
            if path in self.inputs and len(value) == len(self.inputs[path]):
                self._tie(self.inputs[path], value)  # a second call, with the same kernel rows
            self.inputs.setdefault(path, value)
        if path not in self.outputs:
            count = equation.outvars[0].aval.shape[-1]
            self.outputs[path] = self._new(count, origin=("made by", path))
        return self.outputs[path]

    def _elementwise(self, equation: Any, values: list[_Value]) -> _Value:
        width = equation.outvars[0].aval.shape[-1:]
        channels, is_known = [], True
        for atom, value in zip(equation.invars, values, strict=True):
            if atom.aval.shape[-1:] != width:  # a scalar or a single channel, which meets all positions
                self._need(value)
            elif isinstance(value, np.ndarray):
                channels.append(value)
            elif not isinstance(value, str):
                is_known = False
        if not is_known:
            return None
        for other in channels[1:]:
            self._tie(channels[0], other)
        return channels[0] if channels else _UNIFORM

    def _concatenate(self, equation: Any, values: list[_Value]) -> _Value:
        if not any(isinstance(value, np.ndarray) for value in values):
            return None
        if equation.params["dimension"] != equation.outvars[0].aval.ndim - 1:
            return self._elementwise(equation, values)
        parts = []
        for atom, value in zip(equation.invars, values, strict=True):
            if not isinstance(value, np.ndarray):
                self._need(value)
                value = self._new(atom.aval.shape[-1])
                self._need(value)
            parts.append(value)
        return np.concatenate(parts)

    def _pad(self, value: Ids, config: tuple[int, int, int]) -> _Value:
        low, high, interior = config
        if min(low, high) < 0 or interior:
            return None
        # Channels of zeros are interchangeable: which of them are kept does not matter, only how many, so
        # all have the same label.
        before, after = self._new(low, positions=False), self._new(high, positions=False)
        return np.concatenate([before, value, after])

    def _broadcast(self, equation: Any, value: _Value) -> _Value:
        operand, result = equation.invars[0].aval, equation.outvars[0].aval
        dimensions = equation.params["broadcast_dimensions"]
        is_last = bool(dimensions) and dimensions[-1] == result.ndim - 1
        if is_last and operand.shape[-1] == result.shape[-1]:
            return value if isinstance(value, np.ndarray | str) else None
        self._need(value)
        return _UNIFORM if result.ndim else None


def _called_once(equation: Any) -> tuple[Jaxpr, Sequence[Any]] | None:
    """Return the program that an equation calls once with its operands, and its constants; None: no call."""
    if equation.primitive.name not in _CALLS + _CUSTOM_CALLS:
        return None
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = equation.params.get(key)
        if isinstance(inner, ClosedJaxpr):
            return inner.jaxpr, inner.consts
        if isinstance(inner, Jaxpr) and not inner.constvars:
            return inner, ()
    return None


def _keeps_channels(equation: Any) -> bool:
    """Check whether the result's last axis is that of the first operand, position by position."""
    name, parameters = equation.primitive.name, equation.params
    operand, result = equation.invars[0].aval, equation.outvars[0].aval
    last = operand.ndim - 1
    if not result.ndim or result.shape[-1] != operand.shape[-1] or 0 in operand.shape[:-1]:
        return False
    rules: dict[str, Callable[[], bool]] = {
        "reshape": lambda: parameters.get("dimensions") is None,
        "squeeze": lambda: last not in parameters["dimensions"],
        "transpose": lambda: parameters["permutation"][-1] == last,
        "rev": lambda: last not in parameters["dimensions"],
        "slice": lambda: parameters["strides"] is None or parameters["strides"][-1] == 1,
    }
    if name in _REDUCTIONS:
        return last not in parameters["axes"]
    if name in _POOLS:
        per_axis = ("window_dimensions", "window_strides", "base_dilation", "window_dilation")
        return all(parameters[key][-1] == 1 for key in per_axis) and not any(parameters["padding"][-1])
    return name in rules and rules[name]()


def _inner_layers(equation: Any) -> Iterator[str]:
    """Iterate over the paths of layers inside an equation that is not followed."""
    if equation.primitive in (LAYER, PRODUCER, STACKED):
        yield equation.params["path"]
    for program in inner_programs(equation):
        for inner in program.eqns:
            yield from _inner_layers(inner)
