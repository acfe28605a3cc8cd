"""Compacted networks, and the calls of a network."""

import dataclasses
import functools
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.core.scope import DenyList
from flax.linen.dtypes import promote_dtype

from selconv_jax._utils.modules import is_nnx_module
from selconv_jax._xla.explicit_axes import plain_shapes
from selconv_jax.compaction._static_conv import LayerLayout, call_static
from selconv_jax.errors import ConfigError
from selconv_jax.models._parts import Stem
from selconv_jax.nn._interception import call_in_place, intercept_calls, replaced_calls, sow_of_wrapper
from selconv_jax.nn._layers import BatchNormReLU, BatchNormReLUConv, SelectiveConv


class Compact(nn.Module):
    """Network that runs with fewer channels; `selconv_jax.compact` creates it with its variables.

    It is called like the whole network, ``apply(variables, x, train=...)``, and its variables have the same
    names. A layer in ``layouts`` has the variables of a `StaticConv` (none if it has no outputs), and a
    convolution in ``widths`` has fewer outputs. All other variables are unchanged.

    Attributes:
        network: The whole network.
        layouts: Path and layout of each replaced layer.
        widths: Path and number of outputs of each other convolution that lost some.
        method: The network's method to call; None: ``__call__``.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from selconv_jax import SelectiveConv
        >>> from selconv_jax.compaction import Compact, LayerLayout
        >>> layout = LayerLayout(inputs=6, own=(0, 1, 4), copied=(), outputs=8)
        >>> model = Compact(SelectiveConv(8, (3, 3)), layouts=(("", layout),))
        >>> variables = model.init(jax.random.key(0), jnp.ones((1, 5, 5, 6)), train=False)
        >>> variables["params"]["kernel"].shape, sorted(variables)
        ((3, 3, 3, 8), ['batch_stats', 'params'])
    """

    network: nn.Module
    layouts: tuple[tuple[str, LayerLayout], ...] = ()
    widths: tuple[tuple[str, int], ...] = ()
    method: str | None = None

    sow = sow_of_wrapper

    def setup(self) -> None:
        """Share the network's scope, so that this wrapper does not appear in the names of variables."""
        nn.share_scope(self, self.network)

    def __getattr__(self, name: str) -> Any:
        """Return the call under its own name; say that the network's other methods are left out."""
        if name == (vars(self).get("method") or "__call__"):
            return types.MethodType(lambda self, *args, **kwargs: self(*args, **kwargs), self)
        if callable(getattr(type(vars(self).get("network")), name, None)):
            raise AttributeError(
                f"{name!r} is a method of the whole network; only {vars(self).get('method') or '__call__'!r} "
                f"was compacted. For another one, call selconv_jax.compact(..., method={name!r})."
            )
        return super().__getattr__(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network with its layers replaced."""
        layouts, widths = dict(self.layouts), dict(self.widths)

        def swap(module: Any, path: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if is_layer(module) and (layout := layouts.get(path)):
                return call_static(module, layout, *args, **kwargs)
            width = widths.get(path) if is_producer(module) else None
            if width is not None and width != module.features:
                narrow = module.clone(features=width, parent=module.scope)
                return call_in_place(module, narrow, *args, **kwargs)
            return call(*args, **kwargs)

        with replaced_calls(self, swap):
            return getattr(self.network, self.method or "__call__")(*args, **kwargs)

    @property
    def dtype(self) -> Any:
        """Type of the computation; None if the network has no such attribute."""
        return getattr(self.network, "dtype", None)


def is_layer(module: Any) -> bool:
    """Check whether a module is a layer that may be replaced, which excludes subclasses by users."""
    return type(module) in (BatchNormReLUConv, SelectiveConv)


def is_producer(module: Any) -> bool:
    """Check whether a module is another convolution without groups, of which outputs may be removed.

    A convolution with a mask or a custom function may compute one output from the weights of another. A stem
    with batch norm keeps its outputs, of which the batch norm's variables have the number.
    """
    if type(module) is not nn.Conv:
        return type(module) is Stem and not module.norm
    own = (module.mask, module.conv_general_dilated, module.conv_general_dilated_cls)
    is_usual = module.promote_dtype is promote_dtype and all(value is None for value in own)
    return is_usual and module.feature_group_count == 1


def path_parts(path: str) -> tuple[str, ...]:
    """Split a path into its parts; the network itself has none."""
    return tuple(path.split("/")) if path else ()


@dataclasses.dataclass(frozen=True)
class NetworkCall:
    """Calls ``apply(variables, *inputs, train=..., **options)`` of a network."""

    inputs: tuple[Any, ...]  # shapes
    modes: tuple[bool | None, ...]  # values of ``train``; ``(None,)`` if there is no such argument
    may_lack_train: bool = False  # the network has ``**kwargs`` instead, which may not accept ``train``
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def run(
        self,
        model: nn.Module,
        variables: Any,
        inputs: tuple[Any, ...],
        train: bool | None,
        is_recorded: bool = False,
    ) -> Any:
        """Call a network in one of ``modes``; return the output, and in training the changed collections.

        With ``is_recorded``, return in all modes all that the call stores, intermediates included. Batch
        norms over a mapped axis, which is not there, compute the statistics of the input alone.
        """
        with intercept_calls(_without_axis, last=True):
            return self._run(model, variables, inputs, train, is_recorded)

    def _run(
        self, model: nn.Module, variables: Any, inputs: tuple[Any, ...], train: bool | None, is_recorded: bool
    ) -> Any:
        flag = {} if train is None else {"train": train}
        rngs = dict.fromkeys(("params", "dropout"), jax.random.key(0))
        apply: Callable[..., Any] = functools.partial(model.apply, **self.options)
        apply = functools.partial(apply, variables, *inputs, **flag, rngs=rngs)
        if is_recorded:
            # What a call only reads stays immutable, so that missing variables are errors.
            read = ("params", "selectivity") if train else ("params", "selectivity", "batch_stats")
            return apply(mutable=DenyList(read))
        return apply(mutable=DenyList(("intermediates",))) if train else (apply(), {})


def _without_axis(module: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a batch norm without its mapped axis; a handler for `intercept_calls`."""
    if not isinstance(module, BatchNormReLUConv | BatchNormReLU | nn.BatchNorm) or module.axis_name is None:
        return call(*args, **kwargs)
    axis_name = module.axis_name
    object.__setattr__(module, "axis_name", None)
    try:
        return call(*args, **kwargs)
    finally:
        object.__setattr__(module, "axis_name", axis_name)


def check_network(model: Any, variables: Any) -> None:
    """Raise a `ConfigError` unless a model is a Linen module whose variables are not boxed."""
    if not isinstance(model, nn.Module):
        nnx = " For NNX modules, selconv_jax.nnx has this function." if is_nnx_module(model) else ""
        raise ConfigError(f"model is a {type(model).__name__}; it must be a Flax (Linen) module.{nnx}")
    boxes = jax.tree.leaves(variables, is_leaf=lambda leaf: isinstance(leaf, nn.meta.AxisMetadata))
    if any(isinstance(leaf, nn.meta.AxisMetadata) for leaf in boxes):
        raise ConfigError("the variables hold partitioned parameters. Unbox them with flax.linen.meta.unbox.")


def failed_call(method: str | None, call: NetworkCall, train: bool | None, error: Exception) -> ConfigError:
    """Return the error of a network that does not run as a `NetworkCall` calls it."""
    arguments = ", *inputs" if call.inputs else ""
    arguments += "" if train is None else f", train={train}"
    return ConfigError(
        f"the network does not run as model.{method or 'apply'}(variables{arguments}): "
        f"{' '.join(str(error).split())}"
    )


def network_call(
    model: nn.Module,
    variables: Mapping[str, Any],
    inputs: tuple[Any, ...],
    method: Any,
    options: Mapping[str, Any],
) -> tuple[NetworkCall, Compact]:
    """Infer the calls of a network from its signature; return them, and the network with its method.

    Raises:
        ConfigError: There is no such method, an input is not an array, or there are neither inputs nor an
            example of them.
    """
    name = method if isinstance(method, str) or method is None else getattr(method, "__name__", None)
    function = getattr(model, name or "__call__", None) if name or method is None else None
    if not callable(function):
        raise ConfigError(f"method is {method!r}; a {type(model).__name__} has no such method.")
    if not inputs and not hasattr(model, "example_images"):
        raise ConfigError(
            f"a {type(model).__name__} does not provide example inputs; pass its inputs, such as "
            "jnp.ones((1, 32, 32, 3)), or their shapes as jax.ShapeDtypeStruct."
        )
    inputs = inputs or (model.example_images(variables),)
    try:
        shapes = plain_shapes(inputs)
    except TypeError as error:
        raise ConfigError(
            f"the inputs ({', '.join(type(value).__name__ for value in inputs)}) hold more than arrays; pass "
            "arrays, such as jnp.ones((1, 32, 32, 3)), and all else by name."
        ) from error
    arguments = inspect.signature(function).parameters
    fixed = dict(options)
    has_train = "train" in arguments
    is_open = any(argument.kind is inspect.Parameter.VAR_KEYWORD for argument in arguments.values())
    modes: tuple[bool | None, ...] = (False, True) if has_train or is_open else (None,)
    if "train" in fixed:
        modes, is_open = (bool(fixed.pop("train")),), False
    call = NetworkCall(shapes, modes, is_open and not has_train, fixed)
    return call, Compact(model, method=None if name == "__call__" else name)
