"""``selconv models``."""

import argparse
from typing import Any

import jax
import jax.numpy as jnp

from selconv_jax._utils.console import terminal_or_lines
from selconv_jax.analysis._counting import count_multiply_adds, count_parameters
from selconv_jax.errors import ConfigError, nearest
from selconv_jax.models import MODELS, create_model, stem_for

# The image sizes of the method's evaluation and their numbers of classes.
_IMAGES = {(28, 28, 1): 10, (32, 32, 3): 10, (64, 64, 3): 200, (224, 224, 3): 1000}
_PARAMETERS = (32, 32, 3)
_COLUMN = 9  # characters, and a space; with 15 of the name all fit a terminal of 80


def run(options: argparse.Namespace) -> int:
    """Print one row per network as soon as it has been counted."""
    for name in options.names:
        if name not in MODELS:
            raise ConfigError(f"there is no model {name!r}. {nearest(name, MODELS)}")
    height, width, channels = _PARAMETERS
    console = terminal_or_lines()
    for line in (
        f"parameters: {height}x{width}x{channels} images, {_IMAGES[_PARAMETERS]} classes",
        "multiply-adds: per image of each size, in millions; plain, or nothing re-allocated",
        "",
        _line("name", "plain", "selective", *("x".join(map(str, image)) for image in _IMAGES)),
    ):
        console.print(line, soft_wrap=True)
    for name in options.names or MODELS:
        # Plain lines: a table would be shown only when all networks have been counted.
        console.print(_line(name, *_row(name)), soft_wrap=True)
    return 0


def _line(name: str, *numbers: str) -> str:
    return f"{name:<15}" + "".join(f" {number:>{_COLUMN}}" for number in numbers)


def _row(name: str) -> list[str]:
    counts = {image: _counts(name, "plain", image) for image in _IMAGES}
    parameters = counts[_PARAMETERS][0], _counts(name, "selective", _PARAMETERS)[0]
    return [
        *(f"{number:,}" for number in parameters),
        *(f"{multiply_adds / 1e6:,.1f}" for _, multiply_adds in counts.values()),
    ]


def _counts(name: str, variant: str, image: tuple[int, int, int]) -> tuple[int, int]:
    """Count parameters and multiply-adds of a network for one image."""
    model = create_model(
        name, _IMAGES[image], variant=variant, stem=stem_for(image), capacity=0.0, dtype=jnp.float32
    )

    def init(images: jax.Array) -> Any:
        return model.init(jax.random.key(0), images, train=False)

    # Initializing runs the network once, so one trace tells both.
    images = jax.ShapeDtypeStruct((1, *image), jnp.float32)
    multiply_adds = sum(count_multiply_adds(init, images).values())
    return count_parameters(jax.eval_shape(init, images)["params"]), multiply_adds
