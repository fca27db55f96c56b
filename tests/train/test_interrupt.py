"""Signals as a request to stop: which ones, how often, and what stays as it was."""
import os
import signal

import pytest

from r1zero.train.interrupt import Interrupt


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture
def handlers():
    """The handlers of the three signals, as a program has them that nobody has told otherwise; given back."""
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    former = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield lambda: [signal.getsignal(number) for number in numbers]
    for number, handler in former.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_each_signal_asks_to_stop_and_says_so_once(handlers, capfd, name):
    before = handlers()
    with Interrupt() as interrupt:
        assert not interrupt.requested
        send(getattr(signal, name))
        assert interrupt.requested
    assert handlers() == before
    assert capfd.readouterr().err.count("finishing this step, then saving") == 1


@pytest.mark.parametrize("signals", [("SIGTERM", "SIGTERM", "SIGHUP"), ("SIGHUP", "SIGHUP", "SIGTERM"),
                                     ("SIGINT", "SIGTERM", "SIGHUP")])
def test_what_schedulers_and_shells_send_twice_breaks_nothing_off(handlers, capfd, signals):
    with Interrupt() as interrupt:
        for name in signals:
            send(getattr(signal, name))
    assert interrupt.requested
    assert capfd.readouterr().err.count("finishing this step") == 1


@pytest.mark.parametrize("first", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_ctrl_c_after_a_request_breaks_off_at_once(handlers, first):
    before = handlers()
    with pytest.raises(KeyboardInterrupt), Interrupt():
        send(getattr(signal, first))
        send(signal.SIGINT)
    assert handlers() == before


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_that_was_ignored_at_the_start_stays_ignored(handlers, name):
    """As SIGHUP is under nohup, and SIGINT in a job that a shell script put into the background."""
    number = getattr(signal, name)
    signal.signal(number, signal.SIG_IGN)
    with Interrupt() as interrupt:
        send(number)
        assert not interrupt.requested
        assert signal.getsignal(number) == signal.SIG_IGN
    assert signal.getsignal(number) == signal.SIG_IGN


def test_a_system_without_sighup_has_the_others(handlers, monkeypatch):
    monkeypatch.delattr(signal, "SIGHUP")
    with Interrupt() as interrupt:
        send(signal.SIGTERM)
    assert interrupt.requested
