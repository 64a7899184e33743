import signal

import pytest

from server.training import stopping
from server.training.stopping import stop_signals


def test_the_first_signal_is_a_wish_and_a_later_one_ends_at_once(monkeypatch):
    times = iter([100.0, 101.0, 110.0])
    monkeypatch.setattr(stopping.time, "monotonic", lambda: next(times))
    with stop_signals() as wish:
        assert not wish
        signal.raise_signal(signal.SIGINT)
        assert wish
        signal.raise_signal(signal.SIGTERM)  # a second later: the launcher's echo of the same Ctrl-C
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_work_that_nobody_needs_is_left_off_by_the_first_signal():
    done = []

    def work():
        done.append("begun")
        signal.raise_signal(signal.SIGINT)
        done.append("ended")

    with stop_signals() as wish:
        wish.do_unless_stopped(work)
        wish.do_unless_stopped(work)
    assert done == ["begun"]


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with stop_signals():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
