import gc
import signal
import sys
import threading
import time

import pytest

from dynprune_jax.stopping import SIGNALS, Stopped, StopSignals, send_again, stop


def handlers():
    return [signal.getsignal(number) for number in SIGNALS]


def test_a_signal_is_noted_and_a_second_ctrl_c_is_obeyed():
    before = handlers()
    with StopSignals() as signals:
        assert signals.received is None
        for _ in range(2):  # schedulers may send it twice
            signal.raise_signal(signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        with pytest.raises(Stopped) as stopped:
            signal.raise_signal(signal.SIGINT)
    assert stopped.value.exit_code == 130
    assert handlers() == before


def test_where_it_may_a_signal_stops_at_once():
    def stop():
        with signals.obeyed():
            signal.raise_signal(signal.SIGTERM)
            pytest.fail("it went on")

    with StopSignals() as signals:
        with pytest.raises(Stopped) as stopped:
            stop()
        assert stopped.value.exit_code == 143
        with pytest.raises(Stopped), signals.obeyed():
            pytest.fail("a signal has come before")
        signal.raise_signal(signal.SIGTERM)  # noted again


@pytest.fixture
def stopping():
    before = signal.signal(signal.SIGTERM, stop)
    yield
    signal.signal(signal.SIGTERM, before)


def test_a_second_sigterm_does_not_disturb_the_end(stopping):
    with pytest.raises(Stopped) as stopped:
        signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    assert stopped.value.exit_code == 143


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_comes_amid_a_garbage_collection_is_not_lost(stopping, monkeypatch, number):
    def collecting(phase, info):
        gc.callbacks.remove(collecting)
        signal.raise_signal(number)

    monkeypatch.setattr(sys, "unraisablehook", send_again)
    gc.callbacks.append(collecting)
    gc.collect()  # Python drops what is raised in there
    assert collecting not in gc.callbacks
    with pytest.raises((Stopped, KeyboardInterrupt)):
        time.sleep(60)


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            signal.raise_signal(signal.SIGINT)
            assert signals.received is None
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_of_the_main_thread_nothing_is_changed():
    before, inside = handlers(), []

    def enter():
        with StopSignals():
            inside.extend(handlers())

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert inside == before
