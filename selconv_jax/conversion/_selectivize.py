"""Selective networks from trained networks of batch norm, ReLU and convolution."""

import functools
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from flax.core import unfreeze

from selconv_jax._xla.explicit_axes import plain_shapes
from selconv_jax.compaction._network import NetworkCall, check_network, failed_call, network_call
from selconv_jax.conversion._triples import DropoutCall, Triple, find_triples
from selconv_jax.errors import ConfigError
from selconv_jax.nn import _computation as computation
from selconv_jax.nn._interception import call_in_place, replaced_calls, sow_of_wrapper
from selconv_jax.nn._layers import SelectiveConv


class Conversion(NamedTuple):
    """A selective network, and what it was made of.

    Attributes:
        model: The network, called like the plain one.
        variables: Its variables. A converted layer has all of its own under the name of the convolution.
        converted: Path of the batch norm of each converted convolution, by the path of the convolution.
        left: By path, why each remaining convolution was left unchanged.
    """

    model: nn.Module
    variables: dict[str, Any]
    converted: dict[str, str]
    left: dict[str, str]

    def summary(self) -> str:
        """Say in a few lines what was converted, and what was left and why."""
        lines = [
            f"{len(self.converted)} of {len(self.converted) + len(self.left)} convolutions are selective"
        ]
        lines += [f"  {conv} (normalized by {norm})" for conv, norm in self.converted.items()]
        lines += [f"  {conv} is left: {reason}" for conv, reason in self.left.items()]
        return "\n".join(lines)


class Selectivized(nn.Module):
    """Network whose batch norms, ReLUs and convolutions run as selective layers.

    Attributes:
        plain: The network as it was.
        layers: The layers: paths of their batch norm, convolution and dropout, and their settings.
        capacity: See `selconv_jax.SelectiveConv`.
        gate_only: See `selconv_jax.SelectiveConv`.
    """

    plain: nn.Module
    layers: tuple[tuple[str, str, DropoutCall | None, tuple[tuple[str, Any], ...]], ...]
    capacity: float = 1.0
    gate_only: bool = False

    sow = sow_of_wrapper

    def setup(self) -> None:
        """Share the network's scope, so that this wrapper does not appear in the names of variables."""
        nn.share_scope(self, self.plain)

    def __getattr__(self, name: str) -> Any:
        """Say that the network's other methods, which may return what is inside a layer, are left out."""
        if callable(getattr(type(vars(self).get("plain")), name, None)):
            raise AttributeError(
                f"{name!r} is a method of the plain network; only its __call__ was converted. Call the plain "
                f"network from a module whose __call__ calls {name!r}, and convert that."
            )
        return super().__getattr__(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network with its layers replaced."""
        dropouts = {norm: dropout for norm, _, dropout, _ in self.layers}
        layers = {conv: (norm, dropout, dict(settings)) for norm, conv, dropout, settings in self.layers}
        # By the path of a batch norm that has been called, and whose convolution has not: its call, the calls
        # of its dropout since then, and the mode of the one between them.
        seen: dict[str, tuple[jax.Array, bool]] = {}
        since: Counter[str] = Counter()
        deterministic: dict[str, bool] = {}

        def swap(module: Any, path: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if type(module) not in (nn.BatchNorm, nn.Dropout, nn.Conv):
                return call(*args, **kwargs)
            if path in dropouts:
                # The layer computes from the input of its batch norm. What is returned in its place is read
                # only by the ReLU and dropout, whose result the layer ignores. In a call with other
                # arguments than those that were traced more may read it, which NaN shows.
                since[path] = 0
                seen[path] = _norm_call(module, *args, **kwargs)
                x = seen[path][0]
                return x if jax.config.jax_debug_nans else jnp.full_like(x, jnp.nan)
            if type(module) is nn.Dropout:
                owner = None
                for norm in seen:
                    if (dropout := dropouts[norm]) is not None and dropout.path == path:
                        owner = norm if since[norm] == dropout.number else owner
                        since[norm] += 1
                if owner is None:
                    return call(*args, **kwargs)
                x, deterministic[owner] = _dropout_call(module, *args, **kwargs)
                return x
            if path not in layers:
                return call(*args, **kwargs)
            norm, dropout, settings = layers[path]
            x, train = seen.pop(norm)
            # A network may call its dropout in training only.
            without_dropout = dropout is None or deterministic.pop(norm, True)
            layer = SelectiveConv(
                **settings,
                capacity=self.capacity,
                gate_only=self.gate_only,
                kernel_init=module.kernel_init,
                name=module.name,
                parent=module.scope,
            )
            return call_in_place(module, layer, x, train, deterministic=without_dropout)

        with replaced_calls(self, swap, first=True):
            return self.plain(*args, **kwargs)


def selectivize_model(
    model: nn.Module,
    variables: Mapping[str, Any],
    *inputs: Any,
    capacity: float = 1.0,
    gate_only: bool = False,
    **options: Any,
) -> Conversion:
    """Convert a trained network of ordinary Flax layers to a selective one that computes the same function.

    The network is traced. Every ``nn.Conv(..., use_bias=False)`` whose input is the ReLU of an
    ``nn.BatchNorm``, with or without an ``nn.Dropout`` between them, becomes a `SelectiveConv`, if nothing
    else reads what is in between. The network can then be re-allocated, trained further and compacted.

    What is inside of a layer, the output of its batch norm, is not computed: it is NaN where Flax captures
    it, or where the network returns it in a call with other arguments than those given here.

    In training, the running variance takes the unbiased estimate from then on (method, "One selective layer",
    step 2), where ``nn.BatchNorm`` takes the biased one. The gradient of the ReLU at 0 is 0, even where it
    was written as ``jnp.maximum(x, 0)``, whose gradient there is 1/2.

    Args:
        model: The network. It is called as ``model.apply(variables, *inputs, **options)``, with or without
            ``train``.
        variables: Its variables.
        *inputs: Inputs: arrays or `jax.ShapeDtypeStruct`, as only shapes matter.
        capacity: See `selconv_jax.SelectiveConv`; ``result.model.clone(capacity=...)`` changes it.
        gate_only: See `selconv_jax.SelectiveConv`.
        **options: Keyword arguments that are the same in every call, such as ``deterministic=True``.

    Returns:
        The network, its variables, and what was converted and what was not.

    Raises:
        ConfigError: The network does not run on the inputs, as it is or converted, no layer of it can be
            converted, or an argument is out of bounds.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, selconv_jax
        >>> class Network(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x, train):
        ...         x = nn.Conv(16, (3, 3))(x)
        ...         x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        ...         return nn.Conv(8, (3, 3), use_bias=False)(x)
        >>> x = jnp.ones((1, 8, 8, 3))
        >>> variables = Network().init(jax.random.key(0), x, train=False)
        >>> result = selconv_jax.selectivize_model(Network(), variables, x)
        >>> print(result.summary())
        1 of 2 convolutions are selective
          Conv_1 (normalized by BatchNorm_0)
          Conv_0 is left: its input is not the ReLU of a batch norm
    """
    check_network(model, variables)
    computation.check_capacity(capacity)
    call, _ = network_call(model, variables, inputs, None, options)
    variables = unfreeze(dict(variables))
    shapes = plain_shapes(variables)
    found: dict[str, Triple] = {}
    left: dict[str, str] = {}
    for train in call.modes:
        try:
            triples, rest = find_triples(model, shapes, call, train)
        except Exception as error:  # the network's own code may raise anything
            if train and call.may_lack_train and isinstance(error, TypeError):
                continue
            raise failed_call(None, call, train, error) from error
        found |= triples
        left |= rest
    found = {path: triple for path, triple in found.items() if path not in left}
    if not found:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in left.items()) or "it has no nn.Conv"
        note = " Its selective layers need no conversion." if variables.get("selectivity") else ""
        raise ConfigError(
            f"no layer of the network can become selective: {textwrap.shorten(reasons, 300)}.{note}"
        )
    layers = tuple(
        (triple.norm, path, triple.dropout, tuple(triple.settings.items())) for path, triple in found.items()
    )
    selective = Selectivized(model, layers, capacity, gate_only)
    new = _renamed(variables, found, gate_only)
    _check_runs(selective, plain_shapes(new), call)
    return Conversion(selective, new, {path: triple.norm for path, triple in found.items()}, left)


def _check_runs(selective: Selectivized, variables: Mapping[str, Any], call: NetworkCall) -> None:
    """Raise a `ConfigError` unless a converted network runs in the modes of the plain one."""
    for train in call.modes:
        try:
            jax.eval_shape(functools.partial(call.run, selective, train=train), variables, call.inputs)
        except Exception as error:
            if train and call.may_lack_train and isinstance(error, TypeError):
                continue
            raise ConfigError(
                "the network does not run with selective layers, such as where other code reads or maps "
                "their variables. Write them as selconv_jax.SelectiveConv. The error is "
                f"{type(error).__name__}: {' '.join(str(error).split())}"
            ) from error


def _norm_call(
    module: Any, x: jax.Array, use_running_average: bool | None = None, *, mask: Any = None
) -> tuple[jax.Array, bool]:
    """Return the input of a batch norm and whether it would train."""
    del mask  # calls with a mask are no part of a layer
    frozen = nn.merge_param("use_running_average", module.use_running_average, use_running_average)
    return x, not frozen


def _dropout_call(
    module: Any, inputs: jax.Array, deterministic: bool | None = None, rng: Any = None
) -> tuple[jax.Array, bool]:
    """Return the input of a dropout and whether it would leave it as it is."""
    del rng  # the layer draws its own
    return inputs, nn.merge_param("deterministic", module.deterministic, deterministic)


def _renamed(variables: Mapping[str, Any], triples: Mapping[str, Triple], gate_only: bool) -> dict[str, Any]:
    """Move the variables of the batch norms to their convolutions, and add those of the allocation."""
    flat = traverse_util.flatten_dict(variables)
    for path, triple in triples.items():
        conv, norm = tuple(path.split("/")), tuple(triple.norm.split("/"))
        for collection, name in (
            ("params", "scale"),
            ("params", "bias"),
            ("batch_stats", "mean"),
            ("batch_stats", "var"),
        ):
            flat[collection, *conv, name] = flat.pop((collection, *norm, name))
        channels = flat["params", *conv, "scale"].shape
        flat["selectivity", *conv, "gate"] = jnp.ones(channels, bool)
        if not gate_only:
            kernel = flat["params", *conv, "kernel"]
            flat["selectivity", *conv, "source"] = jnp.full(channels, -1, jnp.int32)
            flat["params", *conv, "shift"] = jnp.zeros((*channels, np.ndim(kernel) - 2), kernel.dtype)
    return traverse_util.unflatten_dict(flat)
