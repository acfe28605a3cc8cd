"""The oracle itself against the recorded cases."""

import numpy as np
import pytest

import oracle
from recorded import ALLOCATION_CASES, LAYER_CASES, read


def layer_of(case, prefix=""):
    return oracle.Layer(**{name: case[prefix + name] for name in oracle.Layer._fields})


def close_to(actual, expected):
    """Within 1e-10 of the largest magnitude of the expected array."""
    limit = 1e-10 * max(np.abs(expected).max(), 1e-300)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=limit)


def test_recorded_cases_are_there():
    assert len(ALLOCATION_CASES) == 16
    assert len(LAYER_CASES) == 12


@pytest.mark.parametrize("name", LAYER_CASES)
def test_forward(name):
    case = read(name)
    y, mean, var = oracle.forward(
        case["x"],
        layer_of(case),
        case["strides"],
        case["padding"],
        train=name.endswith("_train"),
    )
    close_to(y, case["y"])
    close_to(mean, case["new_mean"])
    close_to(var, case["new_var"])


@pytest.mark.parametrize("name", ALLOCATION_CASES)
def test_allocation(name):
    case = read(name)
    before = layer_of(case, "in_")
    damage = oracle.damage(before.kernel, before.scale, before.bias, before.gate)
    normalized = oracle.normalize(damage)
    close_to(damage, case["ecdm"])
    close_to(normalized, case["necdm"])
    close_to(oracle.scores(normalized, before.source), case["score"])
    threshold = float(case["threshold"])
    assert oracle.margin(normalized, threshold) > 1e-7
    gate, source = oracle.deallocate(normalized, before.gate, before.source, threshold)
    np.testing.assert_array_equal(gate, case["dealloc_gate"])
    np.testing.assert_array_equal(source, case["dealloc_source"])
    if "drawn" not in case:
        return

    closed = before._replace(gate=gate, source=source)
    normalized = oracle.normalize(oracle.damage(closed.kernel, closed.scale, closed.bias, gate))
    max_copies = None if case["max_copies"] == -1 else int(case["max_copies"])
    score = oracle.scores(normalized, source, max_copies)
    close_to(score, case["realloc_score"])
    assert oracle.candidates(score, gate, int(case["top_k"])) == case["candidates"].tolist()
    np.testing.assert_array_equal(np.flatnonzero(~gate), case["slots"])
    drawn = np.full(gate.shape, -1)
    drawn[case["slots"]] = case["drawn"]
    after = oracle.reallocate(closed, drawn, case["out_shift"])
    for field in oracle.Layer._fields:
        np.testing.assert_array_equal(getattr(after, field), case[f"out_{field}"], field)
