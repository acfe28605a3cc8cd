"""Damage, de-allocation and re-allocation against the recorded rounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recorded import ALLOCATION_CASES, assert_close, read
from selconv_jax.functional import (
    LayerState,
    channel_scores,
    deallocate,
    draw_sources,
    expected_channel_damage,
    fill_slots,
    normalize_damage,
)

pytestmark = pytest.mark.optimized

FIELDS = ("kernel", "scale", "bias", "mean", "var", "gate", "source", "shift")
FLOATS = ("kernel", "scale", "bias", "mean", "var", "shift")


def normalized_damage(state):
    damage = expected_channel_damage(state.kernel, state.scale, state.bias, state.gate)
    return damage, normalize_damage(damage)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ALLOCATION_CASES)
def test_recorded_round(name, dtype):
    case = read(name)
    with jax.enable_x64(dtype == np.float64):
        state = LayerState(
            **{key: jnp.asarray(case[f"in_{key}"], dtype if key in FLOATS else None) for key in FIELDS}
        )
        damage, normalized = normalized_damage(state)
        assert_close(damage, case["ecdm"], dtype, "ecdm")
        assert_close(normalized, case["necdm"], dtype, "necdm")
        assert_close(channel_scores(normalized, None), case["score"], dtype, "score")

        gate, source = deallocate(normalized, state.gate, state.source, float(case["threshold"]))
        np.testing.assert_array_equal(gate, case["dealloc_gate"])
        np.testing.assert_array_equal(source, case["dealloc_source"])
        if "out_gate" not in case:  # recorded up to here only
            return

        state = LayerState(**{**vars(state), "gate": gate, "source": source})
        max_copies = int(case["max_copies"])
        scores = channel_scores(
            normalized_damage(state)[1], state.source, None if max_copies < 0 else max_copies
        )
        assert_close(scores, case["realloc_score"], dtype, "realloc_score")

        candidates = set(case["candidates"].tolist())
        top_k = int(case["top_k"])
        seen = set()
        for seed in range(20):
            drawn = np.asarray(draw_sources(jax.random.key(seed), scores, gate, top_k))
            slots = np.flatnonzero(drawn >= 0)
            np.testing.assert_array_equal(slots, case["slots"])
            seen |= set(drawn[slots].tolist())
        assert seen == (candidates if len(case["slots"]) else set())

        drawn = np.full(gate.shape, -1, np.int32)
        drawn[case["slots"]] = case["drawn"]
        new = fill_slots(state, jnp.asarray(drawn), jnp.asarray(case["out_shift"], dtype))
    for key in FIELDS:
        actual = getattr(new, key)
        if key in FLOATS:
            assert_close(actual, case[f"out_{key}"], dtype, key)
        else:
            np.testing.assert_array_equal(actual, case[f"out_{key}"], err_msg=key)
