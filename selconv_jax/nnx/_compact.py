"""Compaction of NNX modules."""

from typing import Any

import flax.linen as nn
from flax import nnx, traverse_util

from selconv_jax import compaction
from selconv_jax.nnx._linen import to_linen
from selconv_jax.nnx._variables import linen_variables, update_module

__all__ = ["Compact", "compact"]

_TYPES = {"params": nnx.Param, "batch_stats": nnx.BatchStat}


class Compact(nnx.Module):
    """Module that runs with fewer channels; `compact` creates it.

    It is called like the whole module. Its variables have the same names, below ``network``.

    Attributes:
        network: The variables, nested.
        use_running_average: Evaluation mode, see `flax.nnx.BatchNorm`; set by ``train()`` and ``eval()``.
    """

    def __init__(self, model: nn.Module, variables: dict[str, Any], rngs: nnx.Rngs | None) -> None:
        flat = traverse_util.flatten_dict(variables)
        known = {path[1:]: _TYPES[path[0]](leaf) for path, leaf in flat.items() if path[0] in _TYPES}
        self.network = nnx.data(traverse_util.unflatten_dict(known))
        rest = {path: nnx.Variable(leaf) for path, leaf in flat.items() if path[0] not in _TYPES}
        self._rest = nnx.data(traverse_util.unflatten_dict(rest))
        self._model = model
        self._dropout = None if rngs is None else rngs.dropout.fork()
        self.use_running_average = False

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """Call the module; in training mode, update its running statistics."""
        own = {collection: leaves["network"] for collection, leaves in linen_variables(self).items()}
        variables = own | nnx.to_pure_dict(nnx.state(self._rest))
        if self.use_running_average:
            return self._model.apply(variables, *inputs, train=False, **options)
        keys = {} if self._dropout is None else {"dropout": self._dropout()}
        y, changed = self._model.apply(
            variables, *inputs, train=True, mutable=["batch_stats"], rngs=keys, **options
        )
        new = {collection: {"network": leaves} for collection, leaves in (own | dict(changed)).items()}
        update_module(self, new)
        return y


def compact(
    module: nnx.Module, *inputs: Any, multiple: int = 1, rngs: nnx.Rngs | None = None, **options: Any
) -> Compact:
    """Remove closed channels and all computations whose results are unused, see `selconv_jax.compact`.

    Args:
        module: The module; it is not changed.
        *inputs: Inputs of the module: arrays or `jax.ShapeDtypeStruct`, as only shapes matter.
        multiple: Widths are rounded up to a multiple of this number.
        rngs: Generators with a stream ``dropout``, for training on a module with dropout.
        **options: Keyword arguments that are the same in every call.

    Returns:
        The smaller module, in the mode of a new one; call ``eval()`` for evaluation.

    Raises:
        ConfigError: The module does not run on the inputs, or an argument is missing or out of bounds.

    Example:
        >>> import jax, jax.numpy as jnp, selconv_jax
        >>> from flax import nnx
        >>> module = selconv_jax.nnx.SelectiveConv(16, 4, (3, 3), rngs=nnx.Rngs(0))
        >>> module.gate[...] = jnp.arange(16) < 6
        >>> small = selconv_jax.nnx.compact(module, jnp.ones((1, 8, 8, 16)))
        >>> small.network["kernel"].shape
        (3, 3, 6, 4)
    """
    model, variables = to_linen(module)
    small, small_variables = compaction.compact(model, variables, *inputs, multiple=multiple, **options)
    return Compact(small, small_variables, rngs)
