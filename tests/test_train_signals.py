"""Signals that ask a run to stop: the first is noted, and who insists is heard."""

import signal

import pytest

from selconv_jax.train._signals import SharedStopRequest, StopRequest

ANNOUNCING = [signal.SIGHUP, signal.SIGUSR1]


@pytest.fixture
def seen():
    """What arrives where nobody notes it."""
    signals = []
    numbers = [signal.SIGINT, signal.SIGTERM, *ANNOUNCING]
    previous = {number: signal.signal(number, lambda each, frame: signals.append(each)) for number in numbers}
    yield signals
    for number, handler in previous.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", ANNOUNCING)
def test_noted_as_often_as_it_comes(number, seen):
    """A terminal that closes is announced by the system and by the shell."""
    with StopRequest() as stop:
        assert not stop.check()
        signal.raise_signal(number)
        signal.raise_signal(number)
        assert stop.check()
        assert stop.exit_code == 128 + number
        assert seen == []
    signal.raise_signal(number)
    assert seen == [number]


@pytest.mark.parametrize("first", [*ANNOUNCING, signal.SIGTERM])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_who_insists_is_heard(first, second, seen):
    with StopRequest() as stop:
        signal.raise_signal(first)
        signal.raise_signal(second)
        assert seen == [second]
        assert stop.signal == first


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, *ANNOUNCING])
def test_what_is_ignored_stays_so(number, seen):
    """A script ignores Ctrl-C for what it runs in the background, ``nohup`` a closing terminal."""
    signal.signal(number, signal.SIG_IGN)
    with StopRequest() as stop:
        signal.raise_signal(number)
        assert not stop
    assert signal.getsignal(number) is signal.SIG_IGN


@pytest.mark.parametrize("number", [signal.SIGINT, *ANNOUNCING])
def test_of_several_processes_the_runtime_hears_of_it_once(number, seen):
    with SharedStopRequest():
        signal.raise_signal(number)
        for again in ANNOUNCING:
            signal.raise_signal(again)
        assert seen == [signal.SIGTERM]
