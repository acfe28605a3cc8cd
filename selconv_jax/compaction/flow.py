"""Which channel of which layer every array of a traced network holds at every position."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal  # type: ignore[attr-defined]
from numpy.typing import NDArray

from selconv_jax.compaction.trace import LAYER, PRODUCER, STACKED

__all__ = ["Flow", "channel_flow"]

Ids = NDArray[np.int64]

# What is known of the last axis of an array: the channel at each position, that all positions are alike, or
# nothing, as of parameters and images.
_UNIFORM = "uniform"
_Value = Ids | str | None

# Operations position by position. Arrays that meet in one lose and keep the same positions.
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
    """Channels by numbers (ids), and where they go.

    Attributes:
        outputs: Ids ``[O]`` that each layer or other convolution makes, by path.
        inputs: Ids ``[C]`` that come into each layer, by path, in the order of the program.
        classes: ``[ids]``, the class of each id: ids of a class are kept or removed together.
        needed: ``[ids]`` bool, ids that something other than a layer reads, or that leave the network.
        labels: ``[ids]``, alike for an id and the same channel in the trace of a smaller network.
        hidden: Paths of layers inside of loops, branches and stacks.
        signature: Every operation with its numbers; that of a smaller network must be the same.
    """

    outputs: dict[str, Ids]
    inputs: dict[str, Ids]
    classes: Ids
    needed: NDArray[np.bool_]
    labels: list[tuple[Any, ...]]
    hidden: frozenset[str]
    signature: list[tuple[Any, ...]]


def channel_flow(program: ClosedJaxpr) -> Flow:
    """Follows the channels of a traced network from the layers that make them to all who read them.

    Concatenations join them, sums tie them, paddings add channels of zeros; pools, casts, activations and
    whatever else works position by position passes them on. What is not known to do so needs all that it
    reads, and what it makes are no channels.

    Args:
        program: From `trace.trace_network`.

    Returns:
        The flow.
    """
    walk = _Walk()
    for leaving in walk.run(program.jaxpr, program.consts, [None] * len(program.jaxpr.invars)):
        walk.need(leaving)
    classes = np.array([walk.class_of(number) for number in range(len(walk.parents))], np.int64)
    needed = np.zeros(len(classes), bool)
    needed[walk.needed] = True
    return Flow(
        outputs=walk.outputs,
        inputs=walk.inputs,
        classes=classes,
        needed=needed,
        labels=walk.labels,
        hidden=frozenset(walk.hidden),
        signature=walk.signature,
    )


class _Walk:
    """The state of one pass over a program."""

    def __init__(self) -> None:
        self.parents: list[int] = []
        self.labels: list[tuple[Any, ...]] = []
        self.needed: list[int] = []
        self.outputs: dict[str, Ids] = {}
        self.inputs: dict[str, Ids] = {}
        self.hidden: set[str] = set()
        self.signature: list[tuple[Any, ...]] = []
        self._allocations = 0

    def run(self, jaxpr: Jaxpr, constants: Sequence[Any], arguments: Sequence[_Value]) -> list[_Value]:
        """Values of the outputs of a program, from those of its arguments."""
        known: dict[Any, _Value] = dict(zip(jaxpr.invars, arguments, strict=True))
        for variable, constant in zip(jaxpr.constvars, constants, strict=True):
            known[variable] = None
            if np.ndim(constant) == 0:
                self.signature.append(("constant", repr(np.asarray(constant))))

        def value(atom: Any) -> _Value:
            found = None if isinstance(atom, Literal) else known[atom]
            return _UNIFORM if found is None and not atom.aval.shape else found

        for equation in jaxpr.eqns:
            name = equation.primitive.name
            numbers = [repr(atom.val) for atom in equation.invars if isinstance(atom, Literal)]
            self.signature.append((name, equation.params.get("path"), *numbers))
            values = self._equation(equation, [value(atom) for atom in equation.invars])
            known.update(zip(equation.outvars, values, strict=True))
        return [value(atom) for atom in jaxpr.outvars]

    def class_of(self, number: int) -> int:
        """The representative of an id's class."""
        while self.parents[number] != number:
            self.parents[number] = self.parents[self.parents[number]]
            number = self.parents[number]
        return number

    def need(self, value: _Value) -> None:
        """Notes that all channels of an array are read."""
        if isinstance(value, np.ndarray):
            self.needed.extend(value.tolist())

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

    def _equation(self, equation: Any, values: list[_Value]) -> list[_Value]:
        name, parameters = equation.primitive.name, equation.params
        if equation.primitive is LAYER:
            return [self._layer(equation, values[0])]
        if equation.primitive is PRODUCER:
            self.need(values[0])
            return [self._made(parameters["path"], equation.outvars[0].aval.shape[-1])]
        if name in _CALLS + _CUSTOM_CALLS and (inner := _inner_program(parameters)):
            return self.run(*inner, values)
        if name == "optimization_barrier":
            return values
        if name in _ELEMENTWISE:
            return [self._elementwise(values)]
        if name == "concatenate":
            return [self._concatenate(equation, values)]
        if name == "pad" and isinstance(values[0], np.ndarray):
            return [self._pad(values[0], parameters["padding_config"][-1])]
        if name == "broadcast_in_dim" and (passed := self._broadcast(equation, values[0])) is not None:
            return [passed]
        if isinstance(values[0] if values else None, np.ndarray) and _keeps_channels(equation):
            return [values[0]]
        for value in values:
            self.need(value)
        self.hidden.update(_hidden_layers(equation))
        return [None] * len(equation.outvars)

    def _layer(self, equation: Any, value: _Value) -> Ids:
        path, channels = equation.params["path"], equation.invars[0].aval.shape[-1]
        if not isinstance(value, np.ndarray):
            value = self._new(channels)
            self.need(value)
        if path in self.inputs and len(value) == len(self.inputs[path]):
            self._tie(self.inputs[path], value)  # the layer is called again
        self.inputs.setdefault(path, value)
        return self._made(path, equation.outvars[0].aval.shape[-1])

    def _made(self, path: str, count: int) -> Ids:
        if path not in self.outputs:
            self.outputs[path] = self._new(count, origin=("made by", path))
        return self.outputs[path]

    def _elementwise(self, values: list[_Value]) -> _Value:
        channels = [value for value in values if isinstance(value, np.ndarray)]
        if not channels:
            return _UNIFORM if all(value is not None for value in values) else None
        if any(value is None for value in values):
            for value in channels:
                self.need(value)
            return None
        for other in channels[1:]:
            self._tie(channels[0], other)
        return channels[0]

    def _concatenate(self, equation: Any, values: list[_Value]) -> _Value:
        if not any(isinstance(value, np.ndarray) for value in values):
            return None
        if equation.params["dimension"] != equation.outvars[0].aval.ndim - 1:
            return self._elementwise(values)
        parts = []
        for atom, value in zip(equation.invars, values, strict=True):
            if not isinstance(value, np.ndarray):
                value = self._new(atom.aval.shape[-1])
                self.need(value)
            parts.append(value)
        return np.concatenate(parts)

    def _pad(self, value: Ids, config: tuple[int, int, int]) -> _Value:
        low, high, interior = config
        if min(low, high) < 0 or interior:
            self.need(value)
            return None
        # Channels of zeros are all alike: how many of them are kept is what counts, not which.
        before, after = self._new(low, positions=False), self._new(high, positions=False)
        return np.concatenate([before, value, after])

    def _broadcast(self, equation: Any, value: _Value) -> _Value:
        operand, result = equation.invars[0].aval, equation.outvars[0].aval
        dimensions = equation.params["broadcast_dimensions"]
        kept = bool(dimensions) and dimensions[-1] == result.ndim - 1
        if kept and isinstance(value, np.ndarray) and operand.shape[-1] == result.shape[-1]:
            return value
        if isinstance(value, np.ndarray):
            self.need(value)
            return None
        alike = value is not None or not kept or operand.shape[-1] != result.shape[-1]
        return _UNIFORM if alike and result.ndim else None


def _keeps_channels(equation: Any) -> bool:
    """Whether the last axis of the first operand is the last axis of the result, position by position."""
    name, parameters = equation.primitive.name, equation.params
    operand, result = equation.invars[0].aval, equation.outvars[0].aval
    last = operand.ndim - 1
    if not result.ndim or result.shape[-1] != operand.shape[-1]:
        return False
    rules: dict[str, Callable[[], bool]] = {
        "reshape": lambda: parameters.get("dimensions") is None and math.prod(operand.shape) > 0,
        "squeeze": lambda: last not in parameters["dimensions"],
        "transpose": lambda: parameters["permutation"][-1] == last,
        "rev": lambda: last not in parameters["dimensions"],
        "slice": lambda: parameters["strides"] is None or parameters["strides"][-1] == 1,
    }
    if name in _REDUCTIONS:
        return last not in parameters["axes"]
    if name in _POOLS:
        per_axis = ("window_dimensions", "window_strides", "base_dilation", "window_dilation")
        return all(parameters[key][-1] == 1 for key in per_axis) and tuple(parameters["padding"][-1]) == (
            0,
            0,
        )
    return name in rules and rules[name]()


def _inner_program(parameters: dict[str, Any]) -> tuple[Jaxpr, Sequence[Any]] | None:
    """The program that an equation calls once with its operands, and the program's constants."""
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = parameters.get(key)
        if isinstance(inner, ClosedJaxpr):
            return inner.jaxpr, inner.consts
        if isinstance(inner, Jaxpr) and not inner.constvars:
            return inner, ()
    return None


def _hidden_layers(equation: Any) -> Iterator[str]:
    """Paths of the layers inside of an equation that is not followed."""
    if equation.primitive in (LAYER, PRODUCER, STACKED):
        yield equation.params["path"]
    for parameter in equation.params.values():
        for item in parameter if isinstance(parameter, tuple | list) else (parameter,):
            jaxpr = item.jaxpr if isinstance(item, ClosedJaxpr) else item
            if isinstance(jaxpr, Jaxpr):
                for inner in jaxpr.eqns:
                    yield from _hidden_layers(inner)
