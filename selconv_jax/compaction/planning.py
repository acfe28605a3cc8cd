"""From a network and its allocation to a smaller network with the same function."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from flax.core import unfreeze

from selconv_jax.compaction.check import joins_the_same, trains_alike
from selconv_jax.compaction.flow import Flow, channel_flow
from selconv_jax.compaction.liveness import Allocated, needed_channels
from selconv_jax.compaction.module import Compact
from selconv_jax.compaction.plan import CompactionPlan
from selconv_jax.compaction.reduction import reduction
from selconv_jax.compaction.trace import Trace, trace_network
from selconv_jax.errors import ConfigError
from selconv_jax.models import CondenseNet, DenseNet, Pointwise, PreResNet, ResNeXt
from selconv_jax.models.parts import STEMS

__all__ = ["compact", "plan_compaction"]

_NETWORKS = (CondenseNet, DenseNet, Pointwise, PreResNet, ResNeXt)
# Sizes of the images that the stems are for (experiments, "Stem").
_STEM_IMAGES = {"cifar": 32, "tiny_imagenet": 64, "imagenet": 224}


def compact(
    model: nn.Module, variables: Mapping[str, Any], example: Any = None, multiple: int = 1
) -> tuple[Compact, Any]:
    """Removes what a network does not use: closed channels, and all that is computed for nobody.

    A closed channel goes from the layer that reads it and, where no one else reads it, from the layer that
    makes it, through concatenations, sums, pools and groups; a layer that makes nothing any more goes as a
    whole. The smaller network computes the same, in evaluation and, but for other dropout masks, in
    training. Its allocation is fixed: copies read their sources through shifts that can be trained further,
    but it cannot be re-allocated.

    Any Flax model with `SelectiveConv` in it can be compacted, if it is called as
    ``model.apply(variables, x, train=...)``. Of a model whose own code counts on its numbers of channels,
    closed channels are removed only inside of the layers that read them. Layers under ``nn.scan`` and
    ``nn.vmap``, and derived kinds of layers, stay as they are.

    Args:
        model: The network.
        variables: Its variables, with values: gates and sources are read.
        example: An input ``[N, ...]``, or a `jax.ShapeDtypeStruct` of one; None for the networks of
            `selconv_jax.models`. Nothing is computed with it.
        multiple: Widths are rounded up to a multiple of it, such as 8, by keeping closed channels whose
            kernel rows are zero and stay zero.

    Returns:
        The smaller network and its variables.

    Raises:
        ConfigError: The model is none, has been compacted already, or an argument is missing or out of
            bounds.
        ValueError: The variables are not those of the model.

    Example:
        >>> import jax, jax.numpy as jnp, selconv_jax
        >>> from selconv_jax.counting import count_parameters
        >>> layer = selconv_jax.SelectiveConv(features=4, kernel_size=(3, 3))
        >>> x = jnp.ones((1, 8, 8, 16))
        >>> variables = layer.init(jax.random.key(0), x, train=False)
        >>> variables["selectivity"]["gate"] = jnp.arange(16) < 6
        >>> small, small_variables = selconv_jax.compact(layer, variables, example=x)
        >>> count_parameters(variables["params"]), count_parameters(small_variables["params"])
        (640, 228)
        >>> y, expected = small.apply(small_variables, x, train=False), layer.apply(variables, x, train=False)
        >>> bool(jnp.allclose(y, expected, rtol=1e-5))
        True
    """
    plan = plan_compaction(model, variables, example=example, multiple=multiple)
    return plan.model, plan.take(variables)


def plan_compaction(
    model: nn.Module, variables: Mapping[str, Any], *, example: Any = None, multiple: int = 1
) -> CompactionPlan:
    """Plans what `compact` does, for loops that keep the variables of the whole network.

    Args:
        model: See `compact`.
        variables: See `compact`; of the values only gates and sources are read.
        example: See `compact`.
        multiple: See `compact`.

    Returns:
        The plan. If nothing is closed, copied or unused, its model has no layouts and takes the variables
        as they are.

    Raises:
        ConfigError: See `compact`.
        ValueError: See `compact`.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model is a {type(model).__name__}; it must be a Flax (Linen) module.")
    if isinstance(model, Compact):
        raise ConfigError("the model has been compacted already; compact the network it was made from.")
    if not isinstance(multiple, int) or isinstance(multiple, bool) or multiple < 1:
        raise ConfigError(f"multiple is {multiple!r}; it must be a whole number of at least 1, such as 8.")
    example = _shapes(_default_example(model, variables) if example is None else example)
    shapes = _shapes(variables)
    whole = trace_network(model, shapes, example)
    flow = channel_flow(whole.program)
    layers, selective = _allocations(whole, flow, variables)
    flow = _without_hidden(flow)

    def plan_for(flow: Flow) -> tuple[CompactionPlan, bool]:
        kept = needed_channels(flow, layers, multiple)
        found = reduction(flow, layers, kept, selective)
        small_model = Compact(model, tuple(found.layouts.items()), tuple(sorted(found.widths.items())))
        plan = CompactionPlan(small_model, found.places)
        small_shapes = jax.eval_shape(plan.take, shapes)
        is_same = joins_the_same(small_model, small_shapes, example, whole, flow, kept)
        if is_same and not isinstance(model, _NETWORKS):
            is_same = trains_alike(model, shapes, small_model, small_shapes, example)
        return plan, is_same

    plan, is_same = plan_for(flow)
    if not is_same:
        # With all that the layers make, the network's own code meets the arrays that it always met.
        plan, _ = plan_for(dataclasses.replace(flow, needed=np.ones_like(flow.needed)))
    return plan


def _allocations(
    trace: Trace, flow: Flow, variables: Mapping[str, Any]
) -> tuple[dict[str, Allocated], frozenset[str]]:
    """The allocation of every layer that may be changed, and which of them have a gate."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(variables.get("selectivity", {}))):
        raise ValueError(
            "gates and sources are traced, but they decide what is compiled. Plan outside of jax.jit and use "
            "the plan's take and put inside."
        )
    gates = jax.device_get(traverse_util.flatten_dict(unfreeze(variables.get("selectivity", {}))))
    layers, selective = {}, set()
    for path, ids in flow.inputs.items():
        if path in flow.hidden:
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
        layers[path] = Allocated(
            np.asarray(gate, bool),
            np.asarray(source, np.int64),
            trace.layers[path].feature_group_count,
        )
    return layers, frozenset(selective)


def _without_hidden(flow: Flow) -> Flow:
    """The flow without the layers that stay as they are, which need all they read and make."""
    needed = flow.needed.copy()
    for path in flow.hidden:
        for ids in (flow.inputs.get(path), flow.outputs.get(path)):
            if ids is not None:
                needed[ids] = True
    return dataclasses.replace(
        flow,
        needed=needed,
        inputs={path: ids for path, ids in flow.inputs.items() if path not in flow.hidden},
        outputs={path: ids for path, ids in flow.outputs.items() if path not in flow.hidden},
    )


def _default_example(model: nn.Module, variables: Mapping[str, Any]) -> Any:
    """The shape of an image for one of the library's networks."""
    if not isinstance(model, _NETWORKS):
        raise ConfigError(
            f"example is None; a {type(model).__name__} is none of the library's networks, so pass an input, "
            "such as jnp.ones((1, 32, 32, 3)), or its shape as a jax.ShapeDtypeStruct."
        )
    try:
        channels = variables["params"]["stem"]["kernel"].shape[-2]
    except KeyError as error:
        raise ValueError("the variables have no params/stem/kernel: they are not the network's.") from error
    size, stride, pool = STEMS[model.stem]
    del size
    # Large enough for all pools.
    least = stride * (2 if pool else 1) * 2 ** len(model.blocks)
    size = max(_STEM_IMAGES[model.stem], least)
    return jax.ShapeDtypeStruct((1, size, size, channels), model.dtype or jnp.float32)


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype), tree)
