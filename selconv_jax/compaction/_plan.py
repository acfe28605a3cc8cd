"""Compaction of a network and its allocation to a smaller network with the same function."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from flax.core import FrozenDict, freeze, unfreeze

from selconv_jax._xla.explicit_axes import plain_shapes
from selconv_jax.compaction._flow import Flow, channel_flow
from selconv_jax.compaction._liveness import Kept, host_allocations, needed_channels, reduction
from selconv_jax.compaction._network import Compact, NetworkCall, check_network, failed_call, network_call
from selconv_jax.compaction._places import Place, RowsPlace
from selconv_jax.compaction._trace import Trace, coarsest_step, trace_network
from selconv_jax.compaction._verification import joins_the_same, random_case, same_numbers
from selconv_jax.errors import ConfigError
from selconv_jax.nn._interception import intercept_calls, scope_path


@dataclasses.dataclass(frozen=True, eq=False)
class CompactionPlan:
    """Smaller network, and the conversion of variables to it and back; from `plan_compaction`.

    Attributes:
        model: The smaller network, called like the whole one: ``model.apply(variables, x, train=...)``.
        places: Place of each variable of a changed module in the whole network's variable, by collection,
            path and name; None: the smaller network has no such variable.
    """

    model: Compact
    places: Mapping[tuple[str, ...], Place | None]

    def take(self, variables: Mapping[str, Any]) -> Any:
        """Take the variables of the smaller network from those of the whole one.

        A pure function, which can be jitted and differentiated. It takes some or all collections, also trees
        of their structure, such as gradients or momentum: ``plan.take({"params": momentum})["params"]``. The
        result has no ``selectivity`` if no layer has one any more.

        Raises:
            ValueError: A variable does not have the planned shape.
        """
        flat = traverse_util.flatten_dict(unfreeze(dict(variables)), keep_empty_nodes=True)
        small = {}
        for path, leaf in flat.items():
            if (place := self._place(path, leaf)) is not None:
                small[path] = place.take(leaf)
            elif path not in self.places:
                small[path] = leaf
        return _unflatten(small, variables)

    def put(self, variables: Mapping[str, Any], small: Mapping[str, Any]) -> Any:
        """Write collections of the smaller network into those of the whole one.

        A pure function. Entries that the smaller network does not have are kept. The result has the structure
        of ``variables``.

        Raises:
            ValueError: A variable does not have the planned shape, or is not one of the whole network.
        """
        flat = traverse_util.flatten_dict(unfreeze(dict(variables)), keep_empty_nodes=True)
        values = traverse_util.flatten_dict(unfreeze(dict(small)))
        removed = {path for path, place in self.places.items() if place is None}
        if unknown := [path for path in values if path not in flat or path in removed]:
            raise ValueError(
                f"the small variables have {'/'.join(unknown[0])}, for which the whole network has no place. "
                "Pass variables of plan.model and of the network that was planned for."
            )
        for path, value in values.items():
            place = self._place(path, flat[path])
            flat[path] = value if place is None else place.put(flat[path], value)
        return _unflatten(flat, variables)

    def frozen_model(self) -> "FrozenModel":
        """Wrap the smaller network so that it takes and returns variables of the whole network's shapes.

        The allocation is that of the plan; gates and sources in the variables are ignored.
        """
        return FrozenModel(self)

    def _place(self, path: tuple[str, ...], leaf: Any) -> Place | None:
        place = self.places.get(path)
        if place is None or not hasattr(leaf, "shape"):
            return None
        if not place.fits(leaf.shape):
            raise ValueError(
                f"{'/'.join(path)} has shape {leaf.shape}, which is not that of the network this plan was "
                "made for. Make a new plan for other variables."
            )
        return place


@dataclasses.dataclass(frozen=True)
class FrozenModel:
    """Network with whole variables that computes with the smaller one of its plan.

    `CompactionPlan.frozen_model` makes it.

    Attributes:
        plan: The plan.
    """

    plan: CompactionPlan

    @property
    def dtype(self) -> Any:
        """Type of the computation; None if the network has no such attribute."""
        return self.plan.model.dtype

    def apply(self, variables: Mapping[str, Any], *args: Any, mutable: Any = False, **kwargs: Any) -> Any:
        """Apply the network, as ``flax.linen.Module.apply`` of the whole network does.

        Changed collections have the whole network's shapes. Removed channels keep their running statistics,
        which the whole network would update. Dropout in layers zeroes what it zeroes in the whole network.
        """
        apply: Callable[..., Any] = self.plan.model.apply
        with intercept_calls(self._drop_as_whole):
            result = apply(self.plan.take(variables), *args, mutable=mutable, **kwargs)
        if mutable is False:
            return result
        output, changed = result
        known = {name: variables[name] for name in changed if name in variables}
        whole = self.plan.put(known, {name: changed[name] for name in known})
        return output, {**changed, **whole}

    def _drop_as_whole(self, module: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Drop out channels of a layer by numbers drawn for all that the whole network's layer has.

        Random numbers depend on the shape that they are drawn for.
        """
        is_dropout = isinstance(module, nn.Dropout)
        place = self.plan.places.get(("params", *scope_path(module)[:-1], "scale")) if is_dropout else None
        if not isinstance(place, RowsPlace):
            return call(*args, **kwargs)
        x, *others = args
        whole = jnp.ones((*x.shape[:-1], place.size), x.dtype)
        kept = call(whole, *others, **kwargs)
        if kept is whole:  # in evaluation
            return x
        return jnp.where(place.take(kept) != 0, x / (1 - module.rate), jnp.zeros((), x.dtype))


def _unflatten(flat: dict[tuple[str, ...], Any], like: Any) -> Any:
    tree = traverse_util.unflatten_dict(flat)
    return freeze(tree) if isinstance(like, FrozenDict) else tree


def compact(
    model: nn.Module,
    variables: Mapping[str, Any],
    *inputs: Any,
    multiple: int = 1,
    method: Any = None,
    **options: Any,
) -> tuple[Compact, Any]:
    """Remove closed channels and all computations whose results are unused.

    A closed channel is removed from the layer that reads it and, if nothing else reads it, from the layer
    that computes it, through concatenations, sums, pools and groups. A layer without remaining outputs is
    removed as a whole. The smaller network computes the same function in evaluation and, apart from dropout
    masks, in training. Its allocation is fixed, but the shifts of copies remain trainable.

    Any Flax model with `SelectiveConv` layers can be compacted if it is called as
    ``model.apply(variables, x, train=...)``, with one or more inputs, with or without ``train``. If the
    model's own code depends on its numbers of channels, closed channels are removed only from the layers that
    read them. Layers under ``nn.scan`` and ``nn.vmap``, subclasses of the layers, and layers whose variables
    are used elsewhere (tied or normalized weights, penalties) are left unchanged. The removal is verified on
    the traced programs; then both networks are compared on a small batch of random numbers. If they differ,
    less is removed, or nothing, with a warning. Functions with derivatives of their own (`jax.custom_jvp`,
    `jax.custom_vjp`) are judged by what they compute, not by those.

    Args:
        model: The network.
        variables: Its variables, as concrete arrays.
        *inputs: Inputs of the network, ``model.apply(variables, *inputs)``: arrays or
            `jax.ShapeDtypeStruct`, as only shapes matter. Optional for networks of `selconv_jax.models`.
        multiple: Widths are rounded up to a multiple of this number, such as 8, by keeping closed channels,
            whose kernel rows are zero and stay zero.
        method: The method to compact, or its name; None: ``__call__``. Calling the smaller network runs it.
        **options: Keyword arguments that are the same in every call, such as ``deterministic=True``. If
            ``train`` is among them, the network is compacted for that mode only, otherwise for all its modes.

    Returns:
        The smaller network and its variables.

    Raises:
        ConfigError: The model is not a Flax module, is already compacted, or does not run on the inputs, or
            an argument is missing or out of bounds.
        ValueError: The variables do not belong to the model.

    Example:
        >>> import jax, jax.numpy as jnp, selconv_jax
        >>> from selconv_jax.analysis import count_parameters
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
    """Plan what `compact` does, for code that keeps the variables of the whole network.

    Args:
        model: The network.
        variables: Its variables; all except gates and sources may be shapes.
        *inputs: See `compact`, also for the arguments below.
        multiple: Likewise.
        method: Likewise.
        compare: Compare both networks on random numbers. Otherwise nothing is compiled or run, and only the
            traced programs of both are compared.
        **options: Likewise.

    Returns:
        The plan. If no channel is closed, copied or unused, its model takes the variables unchanged.

    Raises:
        ConfigError: See `compact`.
        ValueError: Likewise.

    Example:
        >>> import jax, jax.numpy as jnp, selconv_jax
        >>> layer, x = selconv_jax.SelectiveConv(features=4, kernel_size=(3, 3)), jnp.ones((1, 8, 8, 16))
        >>> variables = layer.init(jax.random.key(0), x, train=False)
        >>> variables["selectivity"]["gate"] = jnp.arange(16) < 6
        >>> plan = selconv_jax.plan_compaction(layer, variables, x)
        >>> small = plan.take(variables)
        >>> small["params"]["kernel"].shape, plan.put(variables, small)["params"]["kernel"].shape
        ((3, 3, 6, 4), (3, 3, 16, 4))
    """
    multiple = _checked(model, variables, multiple)
    call, whole = network_call(model, variables, inputs, method, options)
    shapes = plain_shapes(unfreeze(dict(variables)))
    call, traces = _traces(whole, shapes, call)
    if not traces:
        _warn(
            model, "its layers cannot be followed (does it differentiate through one?), so nothing is removed"
        )
        return CompactionPlan(whole, {})
    flow = channel_flow(traces)
    layers = host_allocations(traces, flow, variables)
    flow = _without_fixed(flow)
    case = None
    # The second attempt keeps all outputs of layers, so that the network's own code sees the same arrays
    # as before; channels are then removed only inside the layers that read them.
    for tried in (flow, dataclasses.replace(flow, needed=np.ones_like(flow.needed))):
        kept = needed_channels(tried, layers, multiple)
        layouts, widths, places = reduction(layers, kept)
        small = Compact(model, tuple(layouts.items()), tuple(sorted(widths.items())), whole.method)
        plan = CompactionPlan(small, places)
        if small == whole:
            return plan
        if not _is_proved(plan, shapes, call, traces, tried, kept):
            continue
        if not compare:
            return plan
        case = random_case(whole, variables, call, flow.outputs) if case is None else case
        if same_numbers(whole, small, plan.take, case, call, coarsest_step(traces)):
            return plan
        _warn(model, "a smaller network computed different outputs, so less is removed")
    _warn(model, "no smaller network was proved to compute the same, so nothing is removed")
    return CompactionPlan(whole, {})


def _checked(model: Any, variables: Mapping[str, Any], multiple: Any) -> int:
    """Check the arguments; return ``multiple`` as an int."""
    check_network(model, variables)
    if isinstance(model, Compact):
        raise ConfigError("the model is already compacted; compact the network that it was made from.")
    if not isinstance(multiple, int | np.integer) or isinstance(multiple, bool) or multiple < 1:
        raise ConfigError(f"multiple is {multiple!r}; it must be a whole number of at least 1, such as 8.")
    return int(multiple)


def _traces(whole: Compact, shapes: Any, call: NetworkCall) -> tuple[NetworkCall, list[Trace]]:
    """Trace the network in each possible mode; return the call with these modes, and the traces, if any."""
    traces: dict[bool | None, Trace] = {}
    for train in call.modes:
        try:
            traces[train] = trace_network(whole, shapes, call, train)
        except Exception as error:
            if train:
                reason = " ".join(str(error).split())
                _warn(
                    whole.network,
                    "it cannot be traced with train=True, so what training alone computes may differ; pass "
                    f"the arguments of training by name ({reason})",
                    stacklevel=5,
                )
                continue
            try:
                run = functools.partial(call.run, whole, train=train)
                jax.eval_shape(lambda tree, x, run=run: run(tree, x)[0], shapes, call.inputs)
            except Exception:
                if call.may_lack_train:
                    return _traces(
                        whole, shapes, dataclasses.replace(call, modes=(None,), may_lack_train=False)
                    )
                raise failed_call(whole.method, call, train, error) from error
            return call, []
    return dataclasses.replace(call, modes=tuple(traces)), list(traces.values())


def _is_proved(
    plan: CompactionPlan, shapes: Any, call: NetworkCall, traces: list[Trace], flow: Flow, kept: Kept
) -> bool:
    """Check that the smaller network's programs are those of the whole one on the kept channels."""
    small_shapes = jax.eval_shape(plan.take, shapes)
    try:
        small = [trace_network(plan.model, small_shapes, call, train) for train in call.modes]
    except Exception:  # user code that depends on its number of channels may raise anything
        return False
    return joins_the_same(small, traces, flow, kept)


def _warn(model: nn.Module, what: str, stacklevel: int = 4) -> None:
    warnings.warn(f"compacting {type(model).__name__}: {what}.", stacklevel=stacklevel)


def _without_fixed(flow: Flow) -> Flow:
    """Drop the layers that must not be changed from the flow; all their inputs and outputs are needed."""
    needed = flow.needed.copy()
    inputs, outputs = dict(flow.inputs), dict(flow.outputs)
    for path in flow.fixed:
        for ids in (inputs.pop(path, None), outputs.pop(path, None)):
            if ids is not None:
                needed[ids] = True
    return dataclasses.replace(flow, needed=needed, inputs=inputs, outputs=outputs)
