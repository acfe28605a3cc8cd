"""Pruning criteria: four rankings of the channels of all layers, and gates that close the lowest."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from selconv_jax.functional import LayerState, expected_channel_damage, normalize_damage

__all__ = ["CRITERIA", "LIBRARY", "close", "rankings"]

CRITERIA = ("expected channel damage", "batch norm scale", "kernel L1 norm", "random")
# Of `pruning_library.py`, which removes channels of a convolution's output wherever they are read.
LIBRARY = ("Torch-Pruning, L1 norm", "Torch-Pruning, batch norm scale")


def rankings(states: Mapping[str, LayerState], criterion: str, seed: int) -> dict[str, np.ndarray]:
    """Score the channels of every layer, comparably between layers; the lowest are closed first.

    Args:
        states: The layers, from `selconv_jax.transforms._layer_tree.layer_states`, all gates open.
        criterion: One of `CRITERIA`. By the method, a channel counts as much as its largest share in the
            expected damage of an output. The L1 norm of a channel's kernel is divided by that of the whole
            layer, as kernels of several sizes are ranked together; a batch norm's scale is taken as it is.
        seed: Of the random ranking.

    Returns:
        ``[C]`` float, by the path of the layer.
    """
    generator = np.random.default_rng(seed)
    scores = {}
    score: jax.Array | np.ndarray
    for path, state in states.items():
        if criterion == "random":
            score = generator.random(state.gate.shape)
        elif criterion == "batch norm scale":
            score = jnp.abs(state.scale)
        elif criterion == "kernel L1 norm":
            norms = jnp.sum(
                jnp.abs(state.kernel), axis=tuple({*range(state.kernel.ndim)} - {state.kernel.ndim - 2})
            )
            score = norms / jnp.sum(norms)
        else:
            damage = expected_channel_damage(state.kernel, state.scale, state.bias, state.gate)
            score = jnp.max(normalize_damage(damage), axis=0)
        scores[path] = np.asarray(jax.device_get(score), np.float64)
    return scores


def close(scores: Mapping[str, np.ndarray], share: float) -> dict[str, np.ndarray]:
    """Make gates that close the lowest-scored fraction of all channels, but never a layer's best channel.

    Args:
        scores: From `rankings`.
        share: Of the channels of all layers together, in [0, 1).

    Returns:
        ``[C]`` bool, by the path of the layer.
    """
    gates = {path: np.ones(score.shape, bool) for path, score in scores.items()}
    order = sorted(
        (score, path, channel) for path, each in scores.items() for channel, score in enumerate(each)
    )
    best = {(path, int(np.argmax(score))) for path, score in scores.items()}
    count = round(share * len(order))
    for _, path, channel in [entry for entry in order if entry[1:] not in best][:count]:
        gates[path][channel] = False
    return gates
