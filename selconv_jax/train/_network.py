"""The network of a run, and the networks of equal function that its steps are compiled for."""

import dataclasses
import hashlib
from collections.abc import Hashable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from selconv_jax.compaction import plan_compaction
from selconv_jax.errors import ConfigError
from selconv_jax.models import create_model, stem_for
from selconv_jax.train._config import ModelConfig
from selconv_jax.transforms._capacity import required_capacity

# Fractions of the channels that a step can be compiled for: few programs, little waste.
CAPACITIES = (0.0, 0.125, 0.25, 0.5, 1.0)

_SET_ELSEWHERE = {
    "num_classes": "it is that of the images, see data.name",
    "variant": "it is model.variant",
    "dtype": "it is model.dtype",
    "param_dtype": "parameters are float32",
    "capacity": "it follows from the allocation",
}


def make_network(config: ModelConfig, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Create the network of a run, for no particular capacity and images of ``(H, W, C)``."""
    for key, origin in _SET_ELSEWHERE.items():
        if key in config.options:
            raise ConfigError(f"model.options.{key} cannot be set: {origin}.")
    arguments = {
        "stem": stem_for(image_shape),
        "variant": config.variant,
        "dtype": jnp.dtype(config.dtype),
        **config.options,
    }
    try:
        return create_model(config.name, num_classes, **arguments)
    except ConfigError as error:
        about_option = str(error).partition(" ")[0] in config.options
        raise ConfigError(f"model.options.{error}" if about_option else str(error)) from None


@dataclasses.dataclass(frozen=True)
class Program:
    """A network equivalent to the run's network for the current allocation.

    Attributes:
        key: Equal for equal programs.
        model: Applied to all of the run's variables, even if the program does not use some of them.
        note: End of a sentence on what it is compiled for; empty for the plain network's program.
    """

    key: Hashable
    model: Any = dataclasses.field(compare=False)
    note: str = dataclasses.field(default="", compare=False)


def bucket_program(model: Any, needed: float) -> Program:
    """Return the program of the smallest of `CAPACITIES` that provides for the needed fraction of copies."""
    capacity = next(bucket for bucket in CAPACITIES if bucket >= needed)
    note = f" for copies in up to {capacity:.1%} of a layer's channels" if capacity else ""
    return Program(("capacity", capacity), model.clone(capacity=capacity), note)


def frozen_program(model: Any, variables: Any, example: Any) -> Program:
    """Return the program of one allocation, without anything that the allocation does not use.

    It is a compacted network with the names and shapes of the full one; if there is nothing to leave out, or
    the network cannot be compacted, that of its copies. ``example`` is a batch as `jax.ShapeDtypeStruct`.
    """
    plan = plan_compaction(model.clone(capacity=0.0), variables, example, compare=False)
    if not plan.model.layouts and not plan.model.widths:
        return bucket_program(model, required_capacity(variables))
    reads = sum(layout.reads for _, layout in plan.model.layouts)
    arriving = sum(layout.inputs for _, layout in plan.model.layouts)
    digest = hashlib.sha256(repr((plan.model.layouts, plan.model.widths)).encode()).hexdigest()
    note = f" for the frozen allocation ({reads:,} of {arriving:,} input channels kept)"
    return Program(("frozen", digest), plan.frozen_model(), note)
