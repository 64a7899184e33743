import threading

from server.training.heartbeat import Heartbeat


def test_it_speaks_when_nobody_else_does_and_says_what_goes_on():
    said, heard = [], threading.Event()
    heart = Heartbeat(lambda text: (said.append(text), heard.set()), seconds=0.0, look_seconds=0.01)
    heart.does("in step 3 of 7")
    heart.start()
    assert heard.wait(10)
    heart.stop()
    assert said[0].startswith("in step 3 of 7, for ")


def test_it_is_silent_while_others_speak():
    heart = Heartbeat(lambda _: None, seconds=1000.0)
    assert not heart.is_due
    silent = Heartbeat(lambda _: None, seconds=0.0)
    assert silent.is_due


def test_it_can_be_stopped_before_it_has_begun():
    Heartbeat(lambda _: None, seconds=1.0).stop()
