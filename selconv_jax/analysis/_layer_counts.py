"""Parameters and multiply-adds of a network by layer: plain, selective, and compacted."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from flax.core import unfreeze

from selconv_jax.analysis._counting import count_multiply_adds, count_parameters
from selconv_jax.compaction import plan_compaction
from selconv_jax.compaction._network import Compact, NetworkCall, example_inputs, network_call, relative_path
from selconv_jax.nn._layers import SelectiveConv, check_capacity

__all__ = ["Count", "LayerCounts", "count_layers", "total_counts"]

Variables = Mapping[str, Any]

# Names, within the traced program, the module that an operation belongs to.
_MARK = "selconv_module_"


@dataclasses.dataclass(frozen=True)
class Count:
    """Size and cost of a layer or of a network.

    Attributes:
        parameters: Trained values.
        multiply_adds: Multiplications, each with its addition, of the convolutions and matrix products.
    """

    parameters: int = 0
    multiply_adds: int = 0

    def __add__(self, other: "Count") -> "Count":
        return Count(self.parameters + other.parameters, self.multiply_adds + other.multiply_adds)


@dataclasses.dataclass(frozen=True)
class LayerCounts:
    """A layer, or a whole network, in its three forms; see `count_layers` for what is counted.

    Attributes:
        path: Of the module, parts joined by ``/``; ``""`` for what belongs to the network itself.
        plain: All channels open, none a copy.
        selective: As allocated, and compiled for the model's ``capacity``.
        compact: Without what is not used.
    """

    path: str
    plain: Count
    selective: Count
    compact: Count


def count_layers(
    model: nn.Module, variables: Variables, *inputs: Any, method: Any = None, **options: Any
) -> list[LayerCounts]:
    """Parameters and multiply-adds of every layer of a network: plain, selective, compact.

    Counted are the products that the compiled programs make in evaluation (``train=False``), as in
    `counting.count_multiply_adds`: taps that fall on padding count, which compilers' own counts leave out;
    batch norms, activations and pools do not. With ``H x W`` pixels of input, a layer takes

    - *plain*: its convolution with all channels open. Parameters are those of the plain network: shifts
      are not among them.
    - *selective*: the same, as closed channels are zeros in the kernel and save nothing, and for each
      selective layer the copies that its ``capacity`` provides for, ``s = ceil(capacity * C)``, however many
      of them are used: the interpolation, ``s H W (H + W)`` as its weights are a matrix per axis, and
      choosing the shifts, ``2 s C``. In programs for TPUs (`platforms.target_platform`) reading the sources
      and putting the copies into their places are products too, ``s H W C`` each. Parameters include the
      shift of every channel.
    - *compact*: the network of `plan_compaction`: open channels alone, and the copies themselves, each as in
      *selective* where it is computed in the place of a channel that is not read (`LayerLayout.is_in_place`),
      else its interpolation alone, ``H W (H + W)``. Parameters include the shifts of the copies. Where
      nothing is closed, copied or unused, it is the selective network itself, compiled for no copies.

    So an allocation costs its copies, which *selective* rounds up to ``capacity`` and *compact* does not, and
    saves its closed channels in *compact* alone. Nothing is computed or compiled: programs are only traced.

    Args:
        model: The network; its ``capacity`` are what the selective one is counted for, so take
            ``model.clone(capacity=...)`` with those it is to run with.
        variables: Its variables; gates and sources are read, all else may be shapes.
        *inputs: What the network is called with, see `plan_compaction`. Multiply-adds are those of the whole
            batch; take ``N = 1``.
        method: See `plan_compaction`.
        **options: See `plan_compaction`.

    Returns:
        The modules that have parameters or products, in the order in which they are called.

    Raises:
        ConfigError: A layer has more copies than its ``capacity`` provide for; or see `plan_compaction`.
        ValueError: See `plan_compaction`.

    Example:
        >>> import jax, jax.numpy as jnp, selconv_jax
        >>> network = selconv_jax.models.DenseNet(num_classes=10, blocks=(1, 1), growth=4, capacity=0.0)
        >>> image = jnp.ones((1, 8, 8, 3))
        >>> variables = network.init(jax.random.key(0), image, train=False)
        >>> variables["selectivity"]["block1_layer1"]["conv2"]["gate"] = jnp.arange(16) < 4
        >>> layers = count_layers(network, variables, image)
        >>> layers[2].path, layers[2].plain.multiply_adds, layers[2].compact.multiply_adds
        ('block1_layer1/conv2', 36864, 9216)
        >>> total_counts(layers).compact.parameters
        1442
    """
    shapes, copies = _shapes(variables), _copies(variables)
    plan = plan_compaction(model, variables, *inputs, compare=False, method=method, **options)
    call, name = network_call(model, inputs or example_inputs(model, variables), method, options)
    whole = Compact(model, method=name)
    small = jax.eval_shape(plan.take, shapes)
    order: dict[str, None] = {}
    plain = _products(whole, shapes, call, order, copies=None)
    selective = _products(whole, shapes, call, order, copies)
    # Of the compacted layers none has a capacity; those that compaction leaves as they are keep theirs.
    compact = _products(plan.model, small, call, order, copies={} if any(copies.values()) else None)
    parameters = [
        _parameters(shapes, without_shifts=copies.keys()),
        _parameters(shapes),
        _parameters(small),
    ]
    for counts in (plain, *parameters):
        order |= dict.fromkeys(counts)
    layers = [
        LayerCounts(
            path,
            *(
                Count(sizes.get(path, 0), products.get(path, 0))
                for sizes, products in zip(parameters, (plain, selective, compact), strict=True)
            ),
        )
        for path in order
    ]
    return [layer for layer in layers if layer.plain != Count() or layer.selective != Count()]


def total_counts(layers: Iterable[LayerCounts]) -> LayerCounts:
    """The sums over the layers, under the path ``"total"``.

    Args:
        layers: From `count_layers`.

    Returns:
        The counts of the network.
    """
    layers = list(layers)
    return LayerCounts(
        "total",
        sum((layer.plain for layer in layers), Count()),
        sum((layer.selective for layer in layers), Count()),
        sum((layer.compact for layer in layers), Count()),
    )


def _products(
    model: Compact,
    variables: Any,
    call: NetworkCall,
    order: dict[str, None],
    copies: Mapping[str, int] | None,
) -> dict[str, int]:
    """Multiply-adds by the path of the innermost module, whose paths are added to ``order``.

    Args:
        model: The network.
        variables: Shapes of its variables.
        call: How it is called.
        order: Paths of the modules that have been called, in order.
        copies: Copies of the selective layers, which must find room; None: compile them for none.
    """
    paths: list[str] = []

    def mark(
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        module: Any = context.module
        path = relative_path(module, ())
        if isinstance(module, SelectiveConv) and context.method_name == "__call__":
            if copies is None and module.capacity:
                return module.clone(capacity=0.0, parent=module.scope)(*args, **kwargs)
            check_capacity(path, module.capacity, args[0].shape[-1], (copies or {}).get(path, 0))
        order.setdefault(path)
        paths.append(path)
        with jax.named_scope(f"{_MARK}{len(paths) - 1}"):
            return function(*args, **kwargs)

    def run(variables: Any, *inputs: Any) -> Any:
        with nn.intercept_methods(mark):
            return call.run(model, variables, inputs, call.modes[0])[0]

    products: dict[str, int] = {}
    for scope, count in count_multiply_adds(run, variables, *call.inputs).items():
        marks = re.findall(f"{_MARK}(\\d+)", scope)
        path = paths[int(marks[-1])] if marks else ""
        products[path] = products.get(path, 0) + count
    return products


def _copies(variables: Variables) -> dict[str, int]:
    """The number of copies by the path of the selective layer; of a stack of layers, the most."""
    flat = traverse_util.flatten_dict(unfreeze(variables.get("selectivity", {})))
    sources = {"/".join(path[:-1]): source for path, source in flat.items() if path[-1] == "source"}
    if any(isinstance(source, jax.ShapeDtypeStruct) for source in sources.values()):
        raise ValueError("gates and sources are shapes; pass their values, which decide what is counted.")
    return {
        path: int((np.asarray(source) >= 0).sum(axis=-1).max())
        for path, source in jax.device_get(sources).items()
    }


def _parameters(variables: Variables, without_shifts: Iterable[str] = ()) -> dict[str, int]:
    """The number of parameters by the path of the module, some layers without their shifts."""
    excluded = {(*path.split("/"), "shift") if path else ("shift",) for path in without_shifts}
    counts: dict[str, int] = {}
    for path, leaf in traverse_util.flatten_dict(unfreeze(variables["params"])).items():
        name = "/".join(path[:-1])
        counts[name] = counts.get(name, 0) + (0 if path in excluded else count_parameters(leaf))
    return counts


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype), tree)
