"""An NNX module as a Linen model, for functions that follow the calls of Linen layers."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from flax.core import Scope, unfreeze
from flax.linen.dtypes import canonicalize_dtype
from flax.nnx.nn.dtypes import promote_dtype
from jax import lax

from selconv_jax import nn as linen
from selconv_jax.nn._interception import path_of_scope
from selconv_jax.nnx._layers import BatchNormReLUConv, SelectiveConv
from selconv_jax.nnx._linen_module import TYPES, LinenModule
from selconv_jax.nnx._variables import collection_of, linen_variables

_Path = tuple[Any, ...]

_REST = "nnx"  # collection of the variables that no other collection takes, such as random number generators

_ABSENT = (0, 0, 0)  # shape of what stands for a variable that a converted or compacted layer does not have

_ADDED = "_added"  # attribute of an NNX layer that holds the variables that only its Linen form has


def to_linen(module: nnx.Module) -> tuple[nn.Module, dict[str, Any]]:
    """Convert an NNX module to a Linen model that computes the same function.

    Its selective and plain layers, convolutions and dropouts become those of Linen, with the same names, and
    a `LinenModule` becomes its model. So `selconv_jax.compact`, `selconv_jax.analysis.count_layers` and
    Flax's own tables work for the module as they do for Linen models.

    Args:
        module: The module; its ``__call__`` is converted. It is not changed.

    Returns:
        The model, called as ``model.apply(variables, *inputs, train=...)``, where ``train`` stands for
        ``module.train()`` and ``module.eval()``, and its variables: those of `linen_variables`, sharing the
        module's arrays, and a collection ``nnx`` if there are others. What the module changes in a call,
        such as counters of random numbers, changes where its collection is mutable.

    Example:
        >>> import jax.numpy as jnp
        >>> import selconv_jax
        >>> from flax import nnx
        >>> layer = selconv_jax.nnx.SelectiveConv(4, 8, (3, 3), rngs=nnx.Rngs(0))
        >>> model, variables = selconv_jax.nnx.to_linen(layer)
        >>> model.apply(variables, jnp.ones((2, 6, 6, 4)), train=False).shape
        (2, 6, 6, 8)
    """
    variables = linen_variables(module)
    flat = nnx.to_flat_state(nnx.state(module))
    rest = {tuple(map(str, path)): _value(leaf) for path, leaf in flat if not collection_of(leaf)}
    if rest:
        variables[_REST] = traverse_util.unflatten_dict(rest)
    layers = tuple(
        (path, _Unbound(layer)) for path, part in nnx.iter_modules(module) if (layer := _linen_layer(part))
    )
    places = tuple((path, collection_of(leaf) or _REST) for path, leaf in flat)
    return _Converted(nnx.graphdef(module), places, layers), variables


@dataclasses.dataclass(frozen=True)
class _Unbound:
    """A Linen module that Flax does not see, as it would bind it to a scope of the attribute's name."""

    module: nn.Module


class _Converted(nn.Module):
    """Linen model of an NNX module.

    Attributes:
        graph: The module without its variables.
        places: Path and collection of every variable.
        layers: Path and Linen form of the layers, and of the `LinenModule`s, that are converted.
    """

    graph: nnx.GraphDef[Any]
    places: tuple[tuple[_Path, str], ...]
    layers: tuple[tuple[_Path, _Unbound], ...]

    @nn.compact
    def __call__(self, *inputs: Any, train: bool, **options: Any) -> Any:
        """Call the module in training or evaluation mode."""
        layers = dict(self.layers)
        targets = {path: (collection, path) for path, collection in self.places}
        state: dict[_Path, Any] = {}
        for path, collection in self.places:
            in_layer = any(path[:length] in layers for length in range(len(path)))
            absent = jnp.zeros(_ABSENT) if in_layer else None
            state[path] = _inner(self.scope, path[:-1]).get_variable(collection, str(path[-1]), absent)
        module: nnx.Module = nnx.merge(self.graph, nnx.from_flat_state(state.items()))
        part: Any
        for path, part in nnx.iter_modules(module):
            if path in layers:
                inside = ("network",) if isinstance(part, LinenModule) else ()
                bound = _Bound(layers[path].module, _inner(self.scope, (*path, *inside)), inside)
                object.__setattr__(part, "_linen", bound)
                part.__class__ = _FORWARDING[type(part)]
                if added := bound.added(part):
                    setattr(
                        part, _ADDED, nnx.data({"/".join(key): nnx.Variable(added[key]) for key in added})
                    )
                for (kind, *names), value in added.items():
                    place = (*path, _ADDED, "/".join((kind, *names)))
                    targets[place], state[place] = (kind, (*path, *inside, *names)), value
        if train:
            module.train()
        else:
            module.eval()
        y = module(*inputs, **options)
        new = {path: _value(leaf) for path, leaf in nnx.to_flat_state(nnx.state(module))}
        for path, (collection, target) in targets.items():
            is_new = new[path] is not state[path] and not _is_absent(new[path])
            if is_new and self.is_mutable_collection(collection):
                _inner(self.scope, target[:-1]).put_variable(collection, str(target[-1]), new[path])
        return y


class _Bound:
    """The Linen form of a layer in one call of its model; no two are equal, so no program of one is kept.

    Args:
        module: The layer.
        scope: Scope of its variables.
        inside: Path of its variables inside of the NNX layer.
    """

    def __init__(self, module: nn.Module, scope: Any, inside: tuple[str, ...]) -> None:
        self._module = module
        self._scope = scope
        self._inside = inside

    def __call__(self, part: nnx.Module, *inputs: Any, **options: Any) -> Any:
        """Call the layer with the variables that its NNX form has now, and update those that it changes.

        They may be others than the model's: normalized by ``nnx.WeightNorm``, or traced by ``nnx.remat``.
        """
        scope, before, held = self._scope, self._scope_variables(), self._held(part)
        before |= {key: value for key, (_, leaf) in held.items() if not _is_absent(value := _value(leaf))}
        inner: Any = Scope(
            traverse_util.unflatten_dict(before),
            scope.rngs,
            scope.name,
            scope.mutable,
            path=path_of_scope(scope),
            flags=scope.flags,
        )
        inner.rng_counters = scope.rng_counters
        y = self._module.clone(parent=inner)(*inputs, **options)
        changed = []
        for key, value in traverse_util.flatten_dict(unfreeze(dict(inner.variables()))).items():
            if value is before.get(key):
                continue
            if key in held:
                path, variable = held[key]
                changed.append((path, variable.replace(value)))
            else:
                _inner(scope, key[1:-1]).put_variable(key[0], key[-1], value)
        nnx.update(part, nnx.from_flat_state(changed))
        return y

    def added(self, part: nnx.Module) -> dict[tuple[str, ...], Any]:
        """Return the variables of the layer that its NNX form lacks: those that a conversion has given it."""
        known = self._held(part)
        return {
            key: value
            for key, value in self._scope_variables().items()
            if key[0] in TYPES and key not in known
        }

    def _scope_variables(self) -> dict[tuple[str, ...], Any]:
        return traverse_util.flatten_dict(unfreeze(dict(self._scope.variables())))

    def _held(self, part: nnx.Module) -> dict[tuple[str, ...], tuple[_Path, Any]]:
        """Return the path in the NNX layer, and the variable there, of each variable in the scope."""
        held, depth = {}, len(self._inside)
        for path, variable in nnx.to_flat_state(nnx.state(part)):
            names = tuple(map(str, path))
            if names[0] == _ADDED:
                held[tuple(names[1].split("/"))] = path, variable
            elif (collection := collection_of(variable)) and names[:depth] == self._inside:
                held[collection, *names[depth:]] = path, variable
        return held

    def with_dtype(self, dtype: Any) -> "_Bound":
        """Return the same layer with another type of the computation."""
        return _Bound(self._module.clone(dtype=dtype), self._scope, self._inside)


def _value(leaf: Any) -> Any:
    """Return the value of a variable; leaves may also be arrays without a variable around them."""
    return leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf


def _is_absent(value: Any) -> bool:
    return jnp.size(value) == 0  # also in a stack, which adds an axis


def _inner(scope: Any, path: _Path) -> Any:
    """Return the scope of the variables below a path of attributes."""
    return functools.reduce(lambda scope, name: scope.push(str(name), reuse=True), path, scope)


def _linen_layer(part: nnx.Module) -> nn.Module | None:
    """Return the Linen form of a layer or `LinenModule`; None: it stays what it is."""
    if type(part) is LinenModule:
        return None if part.has_other_variables else part.model
    if type(part) is nnx.Dropout:
        return nn.Dropout(part.rate, part.broadcast_dims, rng_collection=part.rng_collection)
    kind: Any = _LINEN.get(type(part))
    if kind is None:
        return None
    attributes = vars(part)
    if any(attributes.get(name, usual) is not usual for name, usual in _USUAL.items()):
        return None
    skipped = {"parent", "name", "kernel", "bias", "scale", "dropout", "use_running_average", *_USUAL}
    names = {field.name for field in dataclasses.fields(kind)} & attributes.keys() - skipped
    size = {} if kind is nn.BatchNorm else {"features": attributes["out_features"]}
    converted: nn.Module = kind(**size, **{name: attributes[name] for name in names})
    return converted


def _unary(self: Any, x: Any) -> Any:
    return self._linen(self, x)


def _dropout(self: Any, x: Any, *, deterministic: bool | None = None, rngs: Any = None) -> Any:
    del rngs
    return self._linen(self, x, deterministic=self.deterministic if deterministic is None else deterministic)


def _norm(self: Any, x: Any, use_running_average: bool | None = None, *, mask: Any = None) -> Any:
    frozen = self.use_running_average if use_running_average is None else use_running_average
    bound = self._linen
    if not _is_absent(self.mean[...]):
        # NNX infers the type from the statistics, too; Linen does not.
        own = jax.eval_shape(lambda x: nnx.BatchNorm.__call__(self, x, use_running_average=True), x).dtype
        given = [values[...] for values in (self.scale, self.bias) if values is not None]
        if own != canonicalize_dtype(x, *given, dtype=self.dtype):
            bound = bound.with_dtype(own)
    return bound(self, x, frozen, mask=mask)


def _selective(self: Any, x: Any, use_running_average: bool | None = None, **options: Any) -> Any:
    frozen = self.use_running_average if use_running_average is None else use_running_average
    return self._linen(self, x, not frozen, **options)


def _model(self: Any, *inputs: Any, **options: Any) -> Any:
    return self._linen(self, *inputs, train=not self.use_running_average, **options)


_LINEN = {
    SelectiveConv: linen.SelectiveConv,
    BatchNormReLUConv: linen.BatchNormReLUConv,
    nnx.Conv: nn.Conv,
    nnx.Linear: nn.Dense,
    nnx.BatchNorm: nn.BatchNorm,
}
# Attributes that are converted only where they have their default values.
_USUAL = {
    "mask": None,
    "preferred_element_type": None,
    "promote_dtype": promote_dtype,
    "conv_general_dilated": lax.conv_general_dilated,
    "dot_general": lax.dot_general,
}
_CALLS: dict[type[nnx.Module], Any] = {
    SelectiveConv: _selective,
    BatchNormReLUConv: _selective,
    nnx.Conv: _unary,
    nnx.Linear: _unary,
    nnx.BatchNorm: _norm,
    nnx.Dropout: _dropout,
    LinenModule: _model,
}
# The layers' classes with calls of their Linen forms.
_FORWARDING = {kind: type(kind.__name__, (kind,), {"__call__": call}) for kind, call in _CALLS.items()}
