"""Mean, spread and paired differences, worked by hand."""

import math

import pytest

from selconv_jax.errors import SelconvError
from selconv_jax.report._statistics import PairedDifference, Spread, paired_difference, spread


def test_spread_by_hand():
    assert spread([1.0, 2.0, 6.0]) == Spread(mean=3.0, std=pytest.approx(7**0.5), count=3)
    assert spread([5.0]) == Spread(mean=5.0, std=None, count=1)
    assert spread([2.0, 2.0]).std == 0.0


def t_quantile(degrees, confidence=0.95):
    """The reach of the interval of ``degrees + 1`` differences, in standard errors."""
    seeds = range(degrees + 1)
    difference = paired_difference(
        dict(zip(seeds, seeds, strict=True)), dict.fromkeys(seeds, 0.0), confidence
    )
    return (difference.interval[1] - difference.mean) / difference.std_error


@pytest.mark.parametrize(
    ("degrees", "confidence", "quantile"),
    [  # printed tables of Student's distribution
        (1, 0.95, 12.706),
        (2, 0.95, 4.303),
        (4, 0.95, 2.776),
        (9, 0.95, 2.262),
        (4, 0.99, 4.604),
        (30, 0.90, 1.697),
    ],
)
def test_t_quantile_of_printed_tables(degrees, confidence, quantile):
    assert t_quantile(degrees, confidence) == pytest.approx(quantile, abs=5e-4)


def test_t_quantile_in_closed_form():
    assert t_quantile(1) == pytest.approx(math.tan(math.pi * 0.475), rel=1e-12)
    assert t_quantile(2) == pytest.approx(0.95 * (2 / (1 - 0.95**2)) ** 0.5, rel=1e-12)


def test_paired_difference_by_hand():
    # Differences 1, 2, 3, 4, 5: mean 3, variance 2.5, standard error sqrt(2.5 / 5).
    values = {3: 14.0, 0: 21.0, 1: 32.0, 2: 43.0, 4: 25.0}
    baseline = {0: 20.0, 1: 30.0, 2: 40.0, 3: 10.0, 4: 20.0}
    difference = paired_difference(values, baseline)
    reach = 2.7764451051977987 * 0.5**0.5
    assert difference == PairedDifference(
        mean=3.0,
        std_error=pytest.approx(0.5**0.5),
        interval=(pytest.approx(3 - reach), pytest.approx(3 + reach)),
        count=5,
    )
    assert difference.excludes_zero
    assert paired_difference(baseline, values).mean == -3.0
    assert paired_difference(baseline, values).excludes_zero
    assert not paired_difference(values, baseline, confidence=0.9999).excludes_zero


def test_pairs_cancel_what_a_seed_does_to_both():
    baseline = {0: 10.0, 1: 30.0, 2: 20.0}
    values = {0: 10.9, 1: 31.1, 2: 21.0}
    assert paired_difference(values, baseline).excludes_zero
    shuffled = {0: 31.1, 1: 21.0, 2: 10.9}
    assert paired_difference(shuffled, baseline).mean == pytest.approx(1.0)
    assert not paired_difference(shuffled, baseline).excludes_zero


def test_nothing_is_claimed_of_one_pair_or_of_no_difference():
    single = paired_difference({0: 5.0, 1: 1.0}, {0: 1.0, 2: 1.0})
    assert single == PairedDifference(mean=4.0, std_error=None, interval=None, count=1)
    assert not single.excludes_zero
    same = paired_difference({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0})
    assert same == PairedDifference(mean=0.0, std_error=0.0, interval=None, count=2)
    # Nor of equal differences, as few test images make them; the second ones are rounded.
    for values, baseline in (((0.25, 0.5), (0.375, 0.625)), ((0.10, 0.11), (0.11, 0.12))):
        equal = paired_difference(dict(enumerate(values)), dict(enumerate(baseline)))
        assert (equal.std_error, equal.interval, equal.excludes_zero) == (0.0, None, False)
        assert equal.mean == pytest.approx(values[0] - baseline[0])
    # An end at 0 does not exclude it.
    assert not PairedDifference(mean=1.0, std_error=0.5, interval=(0.0, 2.0), count=3).excludes_zero


def test_what_cannot_be_paired():
    with pytest.raises(SelconvError, match=r"no seed is common to \[0\] and \[1, 2\]"):
        paired_difference({0: 1.0}, {2: 1.0, 1: 1.0})
    with pytest.raises(SelconvError, match=r"seed 1 has nan and 1\.0; both must be finite"):
        paired_difference({0: 1.0, 1: math.nan}, {0: 1.0, 1: 1.0})
    for confidence in (1.0, 0.0, math.nan):
        with pytest.raises(SelconvError, match="confidence is"):
            t_quantile(3, confidence)
