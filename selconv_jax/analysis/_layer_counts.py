"""Trainable parameters and multiply-adds of a network by layer: plain, selective, and compacted."""

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
from selconv_jax.compaction._network import Compact, NetworkCall, network_call, path_parts
from selconv_jax.nn._computation import check_copies
from selconv_jax.nn._interception import own_programs, relative_path
from selconv_jax.nn._layers import SelectiveConv

Variables = Mapping[str, Any]

# Prefix of the scopes that tell, in the traced program, which module an operation belongs to.
_MARK = "selconv_module_"


@dataclasses.dataclass(frozen=True)
class Count:
    """Size and cost of a layer or of a network.

    Attributes:
        parameters: Trainable parameters.
        multiply_adds: Multiply-adds (MACs) of the convolutions and matrix products.
    """

    parameters: int = 0
    multiply_adds: int = 0

    def __add__(self, other: "Count") -> "Count":
        return Count(self.parameters + other.parameters, self.multiply_adds + other.multiply_adds)


@dataclasses.dataclass(frozen=True)
class LayerCounts:
    """A layer, or a whole network, in its three forms; see `count_layers` for what is counted.

    Attributes:
        path: Path of the module, parts joined by ``/``; ``""`` for the network itself.
        plain: With all channels open and no copies.
        selective: As allocated, and compiled for the model's ``capacity``.
        compact: After compaction.
    """

    path: str
    plain: Count
    selective: Count
    compact: Count


def count_layers(
    model: nn.Module, variables: Variables, *inputs: Any, method: Any = None, **options: Any
) -> list[LayerCounts]:
    """Count the trainable parameters and multiply-adds (MACs) of every layer: plain, selective, compact.

    Counts the products of the programs for evaluation (``train=False``), as `count_multiply_adds` does: taps
    that fall on padding count, which compilers' own counts leave out; batch norms, activations and pools do
    not. With ``H x W`` pixels of input, a layer has

    - *plain*: its convolution with all channels open. Parameters exclude shifts, which the plain network
      does not have.
    - *selective*: the same convolution, as closed channels are zero rows of the kernel and save nothing, and
      in each selective layer the ``s = ceil(capacity * C)`` copies that its ``capacity`` provides for, used
      or not: their interpolation, ``s H W (H + W)`` as its weights are one matrix per axis. On TPU, reading
      the sources and writing the copies are products too, ``s H W C`` each. Parameters include the shift of
      every channel.
    - *compact*: the network of `plan_compaction`: open channels and actual copies only. A copy costs the
      same as in *selective* if it takes the place of a channel that is not read
      (`LayerLayout.is_in_place`), otherwise only its interpolation, ``H W (H + W)``. Parameters include the
      shifts of the copies. If nothing is closed, copied or unused, it is the selective network, compiled
      for no copies.

    So an allocation costs its copies, which only *selective* rounds up to ``capacity``, and saves its closed
    channels only in *compact*. Programs are only traced, neither compiled nor run.

    Args:
        model: The network, with the ``capacity`` that it will run with (``model.clone(capacity=...)``).
        variables: Its variables. The values of gates and sources are needed; the others may be shapes.
        *inputs: Inputs, see `compact`. Multiply-adds are those of the whole batch: use ``N = 1``.
        method: See `compact`.
        **options: See `compact`.

    Returns:
        The modules that have parameters or products, in the order in which they are called.

    Raises:
        ConfigError: A layer has more copies than its ``capacity`` provides for; or see `compact`.
        ValueError: See `compact`.

    Example:
        >>> import jax, jax.numpy as jnp, selconv_jax
        >>> from selconv_jax.analysis import count_layers, total_counts
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
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype), variables)
    copies = _copies(variables)
    plan = plan_compaction(model, variables, *inputs, compare=False, method=method, **options)
    call, whole = network_call(model, variables, inputs, method, options)
    small = jax.eval_shape(plan.take, shapes)
    order: dict[str, None] = {}
    plain = _products(whole, shapes, call, order, copies=None)
    selective = _products(whole, shapes, call, order, copies)
    # Compacted layers have no capacity; layers that compaction leaves unchanged keep theirs.
    compact = _products(plan.model, small, call, order, copies={} if any(copies.values()) else None)
    parameters = (_parameters(shapes, without_shifts=copies), _parameters(shapes), _parameters(small))
    for counts in (plain, *parameters):
        order |= dict.fromkeys(counts)
    forms = list(zip(parameters, (plain, selective, compact), strict=True))
    layers = [
        LayerCounts(path, *(Count(sizes.get(path, 0), products.get(path, 0)) for sizes, products in forms))
        for path in order
    ]
    return [layer for layer in layers if layer.plain != Count() or layer.selective != Count()]


def total_counts(layers: Iterable[LayerCounts]) -> LayerCounts:
    """Sum the counts of `count_layers`, under the path ``"total"``."""
    layers = list(layers)
    forms = ("plain", "selective", "compact")
    return LayerCounts("total", *(sum((getattr(each, form) for each in layers), Count()) for form in forms))


def _products(
    model: Compact,
    variables: Any,
    call: NetworkCall,
    order: dict[str, None],
    copies: Mapping[str, int] | None,
) -> dict[str, int]:
    """Count multiply-adds by the path of the innermost module, adding these paths to ``order``.

    The capacity of each selective layer must provide for its ``copies``; None: trace for none.
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
            x = args[0] if args else kwargs["x"]
            check_copies(path, module.capacity, x.shape[-1], (copies or {}).get(path, 0))
        order.setdefault(path)
        paths.append(path)
        with jax.named_scope(f"{_MARK}{len(paths) - 1}"), own_programs(module):
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
    """Count copies by the path of the selective layer; in a stack of layers, the largest count."""
    flat = traverse_util.flatten_dict(unfreeze(variables.get("selectivity", {})))
    sources = {"/".join(path[:-1]): source for path, source in flat.items() if path[-1] == "source"}
    if any(isinstance(source, jax.ShapeDtypeStruct) for source in sources.values()):
        raise ValueError("gates and sources are shapes; pass their values, which decide what is counted.")
    return {
        path: int((np.asarray(source) >= 0).sum(axis=-1).max())
        for path, source in jax.device_get(sources).items()
    }


def _parameters(variables: Variables, without_shifts: Iterable[str] = ()) -> dict[str, int]:
    """Count parameters by the path of the module, excluding the shifts of some layers."""
    excluded = {(*path_parts(path), "shift") for path in without_shifts}
    counts: dict[str, int] = {}
    for path, leaf in traverse_util.flatten_dict(unfreeze(variables["params"])).items():
        name = "/".join(path[:-1])
        counts[name] = counts.get(name, 0) + (0 if path in excluded else count_parameters(leaf))
    return counts
