"""The mathematics of one layer as pure array functions, usable without Flax."""

from selconv_jax.functional._allocation import LayerState, deallocate, draw_sources, fill_slots
from selconv_jax.functional._damage import channel_scores, expected_channel_damage, normalize_damage
from selconv_jax.functional._select import select
from selconv_jax.functional._shift import channel_shift

__all__ = [
    "LayerState",
    "channel_scores",
    "channel_shift",
    "deallocate",
    "draw_sources",
    "expected_channel_damage",
    "fill_slots",
    "normalize_damage",
    "select",
]
