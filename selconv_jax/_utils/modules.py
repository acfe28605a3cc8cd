"""Variables of a model, whichever of Flax's two kinds of modules it is made of."""

import sys
from collections.abc import Mapping
from typing import Any

from selconv_jax.errors import ConfigError


def is_nnx_module(model: Any) -> bool:
    """Check whether something is a module of Flax NNX, without loading NNX for those who do not use it."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(model, nnx.Module)


def is_nnx_state(variables: Any) -> bool:
    """Check likewise whether something is a state of Flax NNX, which is a mapping by attribute."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(variables, nnx.State)


def as_variables(model: Any) -> Any:
    """Return the variables of an NNX module as nested dictionaries, and such dictionaries as they are."""
    if isinstance(model, Mapping):
        return model
    if not is_nnx_module(model):
        raise ConfigError(
            f"variables is a {type(model).__name__}; it must be the nested dictionary that model.init "
            "returned, or an NNX module."
        )
    from selconv_jax.nnx._variables import linen_variables

    return linen_variables(model)
