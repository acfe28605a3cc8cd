"""Signatures of the operations in a traced network, comparable between a network and a smaller one."""

import hashlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from selconv_jax.compaction._trace import LAYER, PRODUCER

__all__ = ["constant_signature", "step_signature"]

# Parameters with an entry for each axis, of which the last may be a number of channels.
_PER_AXIS = ("shape", "new_sizes", "padding_config", "start_indices", "limit_indices")
_ADDRESS = re.compile(r"0x[0-9a-f]+")


def step_signature(equation: Any, any_width: bool) -> tuple[Any, ...]:
    """Describe an operation by its parameters, constants, and the shapes and dtypes of operands and results.

    Args:
        equation: An equation of the program.
        any_width: The operation is known to treat all positions of the last axis alike, so that the size of
            this axis is left out.

    Returns:
        Plain values.
    """
    operands, parameters = equation.invars, dict(equation.params)
    if equation.primitive in (LAYER, PRODUCER):
        operands = operands[: -len(parameters["names"]) or None]
        del parameters["names"]
    end = -1 if any_width else None
    types = tuple(
        (atom.aval.shape[:end], str(atom.aval.dtype)) if hasattr(atom.aval, "shape") else str(atom.aval)
        for atom in (*operands, *equation.outvars)
    )
    for name in _PER_AXIS if any_width else ():
        if isinstance(value := parameters.get(name), tuple):
            parameters[name] = value[:end]
    # Programs inside an operation are compared as text, without the memory addresses of functions.
    written = _ADDRESS.sub("", repr(sorted(parameters.items())))
    constants = tuple(constant_signature(atom.val) for atom in operands if isinstance(atom, Literal))
    return equation.primitive.name, types, written, constants


def constant_signature(constant: Any) -> Any:
    """Describe a constant array by its shape, dtype and a digest of its value."""
    if isinstance(constant, jax.Array) and jnp.issubdtype(constant.dtype, jax.dtypes.prng_key):
        constant = jax.random.key_data(constant)
    value = np.asarray(constant)
    return value.shape, str(value.dtype), hashlib.sha256(value.tobytes()).hexdigest()
