"""Variables of a model, whichever of Flax's two kinds of modules it is made of."""

import sys
from typing import Any


def is_nnx_module(model: Any) -> bool:
    """Check whether something is a module of Flax NNX, without loading NNX for those who do not use it."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(model, nnx.Module)


def as_variables(model: Any) -> Any:
    """Return the variables of an NNX module as nested dictionaries, and anything else as it is."""
    if not is_nnx_module(model):
        return model
    from selconv_jax.nnx._variables import linen_variables

    return linen_variables(model)
