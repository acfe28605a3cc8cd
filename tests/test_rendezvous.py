"""Threads that meet: who is answered when, and what each is told when something goes wrong."""

import dataclasses
import threading

import pytest

from selconv_jax.train._seeds.rendezvous import Abandoned, Rendezvous


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request of the tests."""

    order: tuple
    text: str


def meet(plans, answer):
    """Lets members ask, one after the other, what their plans say; what each got, and what was answered."""
    rendezvous, got, answered = Rendezvous(list(plans)), {name: [] for name in plans}, []

    def member(name):
        try:
            for number in plans[name]:
                got[name].append(rendezvous.ask(name, Asked((number,), f"{name}{number}")))
        except (Abandoned, ValueError) as error:
            got[name].append(type(error))
        finally:
            rendezvous.leave(name)

    def serve(requests):
        answered.append([request.text for request in requests])
        return answer(requests)

    threads = [threading.Thread(target=member, args=(name,)) for name in plans]
    for thread in threads:
        thread.start()
    try:
        rendezvous.serve(serve)
    finally:
        for thread in threads:
            thread.join()
    return got, answered


def test_who_is_behind_is_answered_first_and_then_all_at_once():
    got, answered = meet({"a": [2, 3], "b": [1, 2, 3, 4]}, lambda all: [each.text.upper() for each in all])
    assert answered == [["b1"], ["a2", "b2"], ["a3", "b3"], ["b4"]]
    assert got == {"a": ["A2", "A3"], "b": ["B1", "B2", "B3", "B4"]}


def test_what_goes_wrong_is_told_to_those_who_asked():
    def fail(requests):
        if len(requests) > 1:
            raise ValueError
        return [each.text for each in requests]

    got, _ = meet({"a": [1, 2], "b": [1, 2], "c": [7]}, fail)
    assert got == {"a": [ValueError], "b": [ValueError], "c": ["c7"]}


def test_nobody_waits_when_the_user_insists():
    def insist(requests):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        meet({"a": [1], "b": [1]}, insist)
