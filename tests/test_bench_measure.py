"""Taking turns and the statistics of it, with a clock that the test winds."""

import gc

import pytest

from selconv_jax._bench.rows import Summary, paired_ratio, seconds_of, summarize
from selconv_jax._bench.run import take_rounds


class Clock:
    """Stands still but for what the cases take."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def __call__(self):
        return self.now

    def case(self, name, *seconds):
        """A case that takes these seconds in turn."""
        left = list(seconds)

        def call():
            assert not gc.isenabled()
            self.calls.append(name)
            self.now += left.pop(0)

        return call


def test_every_case_once_per_round_in_changing_orders():
    clock = Clock()
    calls = {name: clock.case(name, *[1.0] * 40) for name in "abc"}
    rounds = take_rounds(calls, repeats=20, seed=0, clock=clock)
    assert len(rounds) == 20
    for number, seconds in enumerate(rounds):
        assert sorted(seconds) == ["a", "b", "c"]
        twice = clock.calls[6 * number : 6 * number + 6]
        assert list(seconds) == twice[::2] == twice[1::2]
    assert len({tuple(seconds) for seconds in rounds}) == 6  # all orders
    assert gc.isenabled()


def test_orders_follow_from_the_seed():
    def orders(seed):
        clock = Clock()
        calls = {name: clock.case(name, *[1.0] * 10) for name in "abcd"}
        return [tuple(seconds) for seconds in take_rounds(calls, 5, seed, clock=clock)]

    assert orders(1) == orders(1) != orders(2)


def test_only_the_second_call_is_timed():
    clock = Clock()

    def on_turn(number, name):
        clock.now += 100.0

    calls = {"a": clock.case("a", 9.0, 1.0, 9.0, 2.0), "b": clock.case("b", 9.0, 10.0, 9.0, 40.0)}
    rounds = take_rounds(calls, 2, seed=0, clock=clock, on_turn=on_turn)
    assert seconds_of(rounds, "a") == [1.0, 2.0]
    assert seconds_of(rounds, "b") == [10.0, 40.0]
    assert paired_ratio(rounds, "b", "a") == 15.0


@pytest.mark.parametrize(("calls", "whole", "rest"), [(0, 0, 0), (6, 1, 1), (8, 2, 0)])
def test_stopping_leaves_what_was_measured(calls, whole, rest):
    clock = Clock()
    cases = {name: clock.case(name, *[1.0] * 18) for name in "ab"}
    rounds = take_rounds(cases, 9, seed=0, clock=clock, should_stop=lambda: len(clock.calls) == calls)
    assert [len(seconds) for seconds in rounds] == [2] * whole + [1] * (rest > 0)
    assert gc.isenabled()


def test_an_error_passes_and_collection_goes_on():
    def fail():
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        take_rounds({"a": fail}, 1, seed=0)
    assert gc.isenabled()


def test_summary_by_hand():
    assert summarize([5.0, 1.0, 2.0, 4.0]) == Summary(
        count=4, median=3.0, low=pytest.approx(1.75), high=pytest.approx(4.25), minimum=1.0
    )
    assert summarize([7.0]) == Summary(count=1, median=7.0, low=7.0, high=7.0, minimum=7.0)


def test_paired_ratio_is_not_moved_by_a_slow_while():
    # In the second half the machine is three times slower.
    rounds = [{"a": 1.0, "b": 1.5}] * 3 + [{"a": 3.0, "b": 4.5}] * 4 + [{"b": 100.0}]
    assert paired_ratio(rounds, "b", "a") == 1.5
    assert paired_ratio(rounds, "b", "none") is None
    assert paired_ratio([], "b", "a") is None
