"""Signals as a request to stop: which ones, how often, and what stays as it was."""
import copy
import os
import pickle
import signal

import pytest

from r1zero.train.interrupt import NAMES, Interrupt, Stopped, ends_like_ctrl_c


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture
def handlers():
    """The handlers of all the signals, as a program has them that nobody has told otherwise; given back."""
    numbers = [getattr(signal, name) for name in NAMES]
    former = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: [signal.getsignal(number) for number in numbers]
    for number, handler in former.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", NAMES)
def test_each_signal_asks_to_stop_and_says_so_once(handlers, capfd, name):
    before = handlers()
    with Interrupt() as interrupt:
        assert not interrupt.requested
        send(getattr(signal, name))
        assert interrupt.requested
    assert handlers() == before
    assert capfd.readouterr().err.count("finishing this step, then saving") == 1


@pytest.mark.parametrize("signals", [("SIGTERM", "SIGTERM", "SIGHUP"), ("SIGHUP", "SIGHUP", "SIGTERM"),
                                     ("SIGUSR1", "SIGUSR1", "SIGTERM"), ("SIGXCPU", "SIGXCPU"),
                                     ("SIGINT", "SIGTERM", "SIGHUP")])
def test_what_schedulers_and_shells_send_twice_breaks_nothing_off(handlers, capfd, signals):
    with Interrupt() as interrupt:
        for name in signals:
            send(getattr(signal, name))
    assert interrupt.requested
    assert capfd.readouterr().err.count("finishing this step") == 1


@pytest.mark.parametrize("first", NAMES)
def test_ctrl_c_after_a_request_breaks_off_at_once(handlers, first):
    before = handlers()
    with pytest.raises(KeyboardInterrupt), Interrupt():
        send(getattr(signal, first))
        send(signal.SIGINT)
    assert handlers() == before


@pytest.mark.parametrize("name", NAMES)
def test_a_signal_that_was_ignored_at_the_start_stays_ignored(handlers, name):
    """As SIGHUP is under nohup, and SIGINT in a job that a shell script put into the background."""
    number = getattr(signal, name)
    signal.signal(number, signal.SIG_IGN)
    with Interrupt() as interrupt:
        send(number)
        assert not interrupt.requested
        assert signal.getsignal(number) == signal.SIG_IGN
    assert signal.getsignal(number) == signal.SIG_IGN


def test_a_system_without_the_signals_of_unix_has_the_others(handlers, monkeypatch):
    for name in ("SIGHUP", "SIGUSR1", "SIGXCPU"):
        monkeypatch.delattr(signal, name)
    with Interrupt() as interrupt:
        send(signal.SIGTERM)
    assert interrupt.requested


def test_a_handler_that_is_not_pythons_is_left_alone(handlers, monkeypatch):
    """signal tells None for one that a library in C has set, and None cannot be set again."""
    get, set_, foreign = signal.getsignal, signal.signal, signal.SIGUSR1

    def set_handler(number, handler):
        former = set_(number, handler)  # raises TypeError for None
        return None if number == foreign else former

    monkeypatch.setattr(signal, "getsignal", lambda number: None if number == foreign else get(number))
    monkeypatch.setattr(signal, "signal", set_handler)
    with Interrupt() as interrupt:
        send(signal.SIGTERM)
    assert interrupt.requested


@pytest.mark.parametrize("name", NAMES[1:])
def test_other_work_is_broken_off_by_them_as_by_ctrl_c(handlers, name):
    number, before = getattr(signal, name), handlers()
    with pytest.raises(KeyboardInterrupt, match=f"ended by {name}") as end, ends_like_ctrl_c():
        send(number)
    assert end.value.exit_code == 128 + number and handlers() == before
    signal.signal(number, signal.SIG_IGN)
    with ends_like_ctrl_c():
        send(number)


def test_two_signals_at_once_end_work_once(handlers):
    with pytest.raises(Stopped) as end, ends_like_ctrl_c():
        try:
            send(signal.SIGTERM)
        finally:
            send(signal.SIGHUP)  # while the first is being told of
    assert end.value.exit_code == 128 + signal.SIGTERM


def test_the_end_can_be_copied_and_pickled():
    """As a process pool does with what its workers raise."""
    for again in (copy.copy(Stopped(15, "ended")), pickle.loads(pickle.dumps(Stopped(15, "ended")))):
        assert str(again) == "ended" and again.exit_code == 143
