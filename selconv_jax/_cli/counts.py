"""Table of the parameters and multiply-adds of a run's network, without reading its images."""

from collections.abc import Mapping
from typing import Any

import jax
from rich.console import RenderableType

from selconv_jax.analysis._layer_counts import count_layers
from selconv_jax.data._catalog import find_known
from selconv_jax.report._tables import count_table
from selconv_jax.train._config import Config
from selconv_jax.train._network import make_network
from selconv_jax.train._program import bucket_program
from selconv_jax.transforms._capacity import required_capacity

__all__ = ["run_counts"]

_HEADING = "parameters and multiply-adds"


def run_counts(config: Config, variables: Mapping[str, Any]) -> RenderableType:
    """Count parameters and multiply-adds (MACs) of a run's network, by layer and in total.

    Nothing is compiled, and no image is read: the name of the data set determines the image shape.

    Args:
        config: The run.
        variables: The variables of its network; empty if there is no checkpoint.

    Returns:
        The table, or a line that explains why there is none.

    Raises:
        SelconvError: The configuration and the variables do not match.
    """
    known = find_known(config.data.name)
    if not variables:
        return f"{_HEADING}: not counted, as there is no checkpoint"
    if known is None:
        return (
            f"{_HEADING}: not counted, as the size of the images of {config.data.name} is in none of the "
            "run's files"
        )
    network = make_network(config.model, known.image_shape, known.num_classes)
    needed = required_capacity(variables) if variables.get("selectivity") else 0.0
    model = bucket_program(network, needed).model
    image = jax.ShapeDtypeStruct((1, *known.image_shape), model.dtype)
    size = "x".join(map(str, known.image_shape))
    title = f"{_HEADING} (in millions) per image of {size}"
    if not variables.get("selectivity"):
        return count_table(count_layers(model, variables, image), title, forms=("plain",))
    copies = f"copies in up to {model.capacity:.1%} of a layer's channels" if model.capacity else "no copies"
    title += f"; selective: as compiled for {copies}"
    return count_table(count_layers(model, variables, image), title)
