"""From a network and its allocation to a smaller network with the same function."""

import dataclasses
import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import traverse_util
from flax.core import unfreeze

from selconv_jax.compaction._flow import Flow, channel_flow
from selconv_jax.compaction._liveness import HostAllocation, Kept, needed_channels, reduction
from selconv_jax.compaction._network import Compact, NetworkCall, example_inputs, network_call
from selconv_jax.compaction._plan import CompactionPlan
from selconv_jax.compaction._trace import Trace, coarsest_step, trace_network
from selconv_jax.compaction._verification import joins_the_same, random_case, same_numbers
from selconv_jax.errors import ConfigError

__all__ = ["compact", "plan_compaction"]


def compact(
    model: nn.Module,
    variables: Mapping[str, Any],
    *inputs: Any,
    multiple: int = 1,
    method: Any = None,
    **options: Any,
) -> tuple[Compact, Any]:
    """Remove what a network does not use: closed channels, and all that is computed for nobody.

    A closed channel goes from the layer that reads it and, where no one else reads it, from the layer that
    makes it, through concatenations, sums, pools and groups; a layer that makes nothing any more goes as a
    whole. The smaller network computes the same, in evaluation and, but for other dropout masks, in
    training. Its allocation is fixed: copies read their sources through shifts that can be trained further,
    but it cannot be re-allocated.

    Any Flax model with `SelectiveConv` in it can be compacted, if it is called as
    ``model.apply(variables, x, train=...)``, with several inputs, or without ``train``. Of a model whose own
    code counts on its numbers of channels, closed channels are removed only inside of the layers that read
    them. Layers under ``nn.scan`` and ``nn.vmap``, derived kinds of layers, and layers whose variables
    something else reads (tied or normalized weights, penalties) stay as they are. What is removed is proved
    on the traced programs; then both networks are compared on a small batch of random numbers. Should they
    differ, less is removed, or nothing, with a warning.

    Args:
        model: The network.
        variables: Its variables, with values: gates and sources are read.
        *inputs: What the network is called with, ``model.apply(variables, *inputs)``: arrays, or
            `jax.ShapeDtypeStruct`, as only shapes matter. May be left out for `selconv_jax.models`.
        multiple: Widths are rounded up to a multiple of it, such as 8, by keeping closed channels whose
            kernel rows are zero and stay zero.
        method: The network's method that is to be compacted, or its name; None: ``__call__``. It is what the
            smaller network does when called.
        **options: Further arguments by name that do not change from call to call, such as
            ``deterministic=True``. With ``train`` among them the network is compacted for that mode alone,
            without, for all that it has.

    Returns:
        The smaller network and its variables.

    Raises:
        ConfigError: The model is none, has been compacted already, does not run on the example, or an
            argument is missing or out of bounds.
        ValueError: The variables are not those of the model.

    Example:
        >>> import jax, jax.numpy as jnp, selconv_jax
        >>> from selconv_jax.analysis._counting import count_parameters
        >>> layer = selconv_jax.SelectiveConv(features=4, kernel_size=(3, 3))
        >>> x = jnp.ones((1, 8, 8, 16))
        >>> variables = layer.init(jax.random.key(0), x, train=False)
        >>> variables["selectivity"]["gate"] = jnp.arange(16) < 6
        >>> small, small_variables = selconv_jax.compact(layer, variables, x)
        >>> count_parameters(variables["params"]), count_parameters(small_variables["params"])
        (640, 228)
        >>> y, expected = small.apply(small_variables, x, train=False), layer.apply(variables, x, train=False)
        >>> bool(jnp.allclose(y, expected, rtol=1e-5))
        True
    """
    plan = plan_compaction(model, variables, *inputs, multiple=multiple, method=method, **options)
    return plan.model, plan.take(variables)


def plan_compaction(
    model: nn.Module,
    variables: Mapping[str, Any],
    *inputs: Any,
    multiple: int = 1,
    method: Any = None,
    compare: bool = True,
    **options: Any,
) -> CompactionPlan:
    """Plans what `compact` does, for loops that keep the variables of the whole network.

    Args:
        model: See `compact`.
        variables: See `compact`; those of the layers may be shapes, but for gates and sources.
        *inputs: See `compact`.
        multiple: See `compact`.
        method: See `compact`.
        compare: Compare the two networks on numbers, too. Else nothing is computed or compiled, and what is
            known of their programs has to do.
        **options: See `compact`.

    Returns:
        The plan. If nothing is closed, copied or unused, its model has no layouts and takes the variables
        as they are.

    Raises:
        ConfigError: See `compact`.
        ValueError: See `compact`.
    """
    multiple = _checked(model, variables, multiple)
    call, name = network_call(model, inputs or example_inputs(model, variables), method, options)
    whole = Compact(model, method=name)
    shapes = jax.eval_shape(lambda tree: tree, unfreeze(dict(variables)))
    call, traces = _traces(whole, shapes, call)
    if not traces:
        _say(
            model,
            "its layers cannot be followed (is one differentiated in it?), so nothing is removed",
        )
        return CompactionPlan(whole, {})
    flow = channel_flow(traces)
    layers, selective = _allocations(traces, flow, variables)
    flow = _without_fixed(flow)
    case = None
    # With all that the layers make, the network's own code meets the arrays that it always met.
    for tried in (flow, dataclasses.replace(flow, needed=np.ones_like(flow.needed))):
        kept = needed_channels(tried, layers, multiple)
        found = reduction(tried, layers, kept, selective)
        small = Compact(model, tuple(found.layouts.items()), tuple(sorted(found.widths.items())), name)
        plan = CompactionPlan(small, found.places)
        if small == whole:
            return plan
        if not _is_proved(plan, shapes, call, traces, tried, kept):
            continue
        if not compare:
            return plan
        case = random_case(whole, variables, call, flow.outputs) if case is None else case
        if same_numbers(whole, plan, case, call, coarsest_step(traces)):
            return plan
        _say(model, "a smaller network computed other numbers, so less is removed")
    _say(model, "no smaller network was proved to compute the same, so nothing is removed")
    return CompactionPlan(whole, {})


def _checked(model: Any, variables: Mapping[str, Any], multiple: Any) -> int:
    """The multiple as an int; refuses arguments of other kinds."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model is a {type(model).__name__}; it must be a Flax (Linen) module.")
    if isinstance(model, Compact):
        raise ConfigError("the model has been compacted already; compact the network it was made from.")
    if not isinstance(multiple, int | np.integer) or isinstance(multiple, bool) or multiple < 1:
        raise ConfigError(f"multiple is {multiple!r}; it must be a whole number of at least 1, such as 8.")
    boxes = jax.tree.leaves(variables, is_leaf=lambda leaf: isinstance(leaf, nn.meta.AxisMetadata))
    if any(isinstance(leaf, nn.meta.AxisMetadata) for leaf in boxes):
        raise ConfigError("the variables hold partitioned parameters. Unbox them with flax.linen.meta.unbox.")
    return int(multiple)


def _traces(whole: Compact, shapes: Any, call: NetworkCall) -> tuple[NetworkCall, list[Trace]]:
    """The network in each mode it can be traced in, and the call with these modes; none if in none."""
    traces: dict[bool | None, Trace] = {}
    for train in call.modes:
        try:
            traces[train] = trace_network(whole, shapes, call, train)
        except Exception as error:
            if train:  # it wants to be trained in another way, which is not known
                continue
            try:
                run = functools.partial(call.run, whole, train=train)
                jax.eval_shape(lambda tree, x, run=run: run(tree, x)[0], shapes, call.inputs)
            except Exception:
                if call.may_lack_train:
                    return _traces(
                        whole, shapes, dataclasses.replace(call, modes=(None,), may_lack_train=False)
                    )
                arguments = ", *inputs" if call.inputs else ""
                arguments += "" if train is None else f", train={train}"
                raise ConfigError(
                    f"the network does not run as model.{whole.method or 'apply'}(variables"
                    f"{arguments}): {' '.join(str(error).split())}"
                ) from error
            return call, []
    return dataclasses.replace(call, modes=tuple(traces)), list(traces.values())


def _is_proved(
    plan: CompactionPlan, shapes: Any, call: NetworkCall, traces: list[Trace], flow: Flow, kept: Kept
) -> bool:
    """Whether the smaller network's programs are those of the whole one, with the channels that are left."""
    small_shapes = jax.eval_shape(plan.take, shapes)
    try:
        small = [trace_network(plan.model, small_shapes, call, train) for train in call.modes]
    except Exception:  # whatever a user's code raises that counts on its number of channels
        return False
    return joins_the_same(small, traces, flow, kept)


def _say(model: nn.Module, what: str) -> None:
    warnings.warn(f"compacting {type(model).__name__}: {what}.", stacklevel=4)


def _allocations(
    traces: Sequence[Trace], flow: Flow, variables: Mapping[str, Any]
) -> tuple[dict[str, HostAllocation], frozenset[str]]:
    """The allocation of every layer that may be changed, and which of them have a gate."""
    gates = traverse_util.flatten_dict(unfreeze(variables.get("selectivity", {})))
    if any(isinstance(leaf, jax.core.Tracer) for leaf in gates.values()):
        raise ValueError(
            "gates and sources are traced, but they decide what is compiled. Plan outside of jax.jit and use "
            "the plan's take and put inside."
        )
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in gates.values()):
        raise ValueError("gates and sources are shapes; pass their values, which decide what is compiled.")
    gates = jax.device_get(gates)
    groups = {path: count for trace in traces for path, count in trace.groups.items()}
    layers, selective = {}, set()
    for path, ids in flow.inputs.items():
        if path in flow.fixed:
            continue
        parts = tuple(path.split("/")) if path else ()
        gate = gates.get((*parts, "gate"))
        if gate is None:
            gate = np.ones(len(ids), bool)
        else:
            selective.add(path)
        if gate.shape != ids.shape:
            raise ValueError(
                f"layer {path!r}: gate has shape {gate.shape}, but {len(ids)} channels come in. Pass the "
                "variables of this model."
            )
        source = gates.get((*parts, "source"), np.full(len(ids), -1))
        layers[path] = HostAllocation(np.asarray(gate, bool), np.asarray(source, np.int64), groups[path])
    return layers, frozenset(selective)


def _without_fixed(flow: Flow) -> Flow:
    """The flow without the layers that stay as they are, which need all they read and make."""
    needed = flow.needed.copy()
    for path in flow.fixed:
        for ids in (flow.inputs.get(path), flow.outputs.get(path)):
            if ids is not None:
                needed[ids] = True
    return dataclasses.replace(
        flow,
        needed=needed,
        inputs={path: ids for path, ids in flow.inputs.items() if path not in flow.fixed},
        outputs={path: ids for path, ids in flow.outputs.items() if path not in flow.fixed},
    )
