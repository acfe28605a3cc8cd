"""A Linen model as an NNX module."""

from typing import Any

import flax.linen as nn
from flax import nnx, traverse_util

from selconv_jax.nnx._layers import Selectivity
from selconv_jax.nnx._variables import linen_variables

TYPES = {"params": nnx.Param, "batch_stats": nnx.BatchStat, "selectivity": Selectivity}


class LinenModule(nnx.Module):
    """Module that computes what a Linen model does; `compact` and `selectivize_module` create it.

    It is called like the module that it was made from. Its variables have the same names, below ``network``.

    Attributes:
        network: The variables, nested.
        model: The Linen model; may be replaced by a clone with other settings, such as a ``capacity``.
        use_running_average: Evaluation mode, see `flax.nnx.BatchNorm`; set by ``train()`` and ``eval()``.
    """

    def __init__(self, model: nn.Module, variables: dict[str, Any], rngs: nnx.Rngs | None) -> None:
        flat = traverse_util.flatten_dict(variables)
        known = {path[1:]: TYPES[path[0]](leaf) for path, leaf in flat.items() if path[0] in TYPES}
        self.network = nnx.data(traverse_util.unflatten_dict(known))
        rest = {path: nnx.Variable(leaf) for path, leaf in flat.items() if path[0] not in TYPES}
        self._rest = nnx.data(traverse_util.unflatten_dict(rest))
        self.model = model
        self._dropout = None if rngs is None else rngs.dropout.fork()
        self.use_running_average = False

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """Call the model; update what it changes: running statistics in training, and other variables."""
        variables, train = self.variables(), not self.use_running_average
        keys = {} if not train or self._dropout is None else {"dropout": self._dropout()}
        mutable = [name for name in variables if name not in ("params", "selectivity")]
        y, changed = self.model.apply(variables, *inputs, train=train, mutable=mutable, rngs=keys, **options)
        old, new, known, rest = map(
            traverse_util.flatten_dict, (variables, changed, self.network, self._rest)
        )
        for path, value in new.items():
            # In evaluation, under `jax.jit` too, what is only read must not be written.
            if path in old and value is not old[path]:
                (known[path[1:]] if path[0] in TYPES else rest[path]).set_value(value)
        return y

    @property
    def has_other_variables(self) -> bool:
        """Whether the Linen model has collections that `linen_variables` leaves out."""
        return bool(nnx.to_flat_state(nnx.state(self._rest)))

    def variables(self) -> dict[str, Any]:
        """Collect the variables of the Linen model, by collection."""
        own = {collection: leaves["network"] for collection, leaves in linen_variables(self).items()}
        return own | nnx.to_pure_dict(nnx.state(self._rest))
