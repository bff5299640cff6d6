"""Signals become a flag; a second one acts as usual; handlers are put back."""

import os
import signal
import threading

import pytest

from jaxrec.training.interrupt import Interrupted, SignalFlag


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_remembered(number):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with SignalFlag() as flag:
        assert flag.received is None
        os.kill(os.getpid(), number)
        assert flag.received == number
        # From now on both mean what they meant before.
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_second_signal_acts_as_usual():
    with SignalFlag():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_handlers_are_put_back_after_an_error():
    before = signal.getsignal(signal.SIGTERM)

    def fail():
        with SignalFlag():
            assert signal.getsignal(signal.SIGTERM) != before
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert signal.getsignal(signal.SIGTERM) == before


def test_threads_leave_signals_alone():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work():
        with SignalFlag() as flag:
            seen.append((flag.received, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(None, before)]


def test_the_exception_carries_the_number():
    stop = Interrupted(15, "stopped")
    assert stop.signal == 15
    assert str(stop) == "stopped"
