"""The view on a terminal: events above, one line below."""

import io
import logging

from rich.console import Console

from client.operator.live import live_view
from client.records.journal import Journal
from client.training.progress import told
from tests.client.conftest import MakeSite


def test_terminal_shows_events_above_a_bar_that_moves(make_site: MakeSite):
    place, _ = make_site()
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    logger = logging.getLogger()
    handler = logging.StreamHandler(screen)
    logger.addHandler(handler)
    try:
        with live_view(place, console) as live:
            live.tick()
            assert "waiting for requests" in shown(live.render())
            with told(place, "run[1]", 3, 40) as tell:
                tell(10)
                live.tick()
                assert "run[1] round 3" in shown(live.render())
                assert "10/40" in shown(live.render())
                tell(20)
                live.tick()
                assert "20/40" in shown(live.render())
            with told(place, "run[1]", 4, 40):
                live.tick()
                assert "round 4" in shown(live.render())
                assert "0/40" in shown(live.render())
            live.tick()
            assert "waiting for requests" in shown(live.render())
            assert handler.stream is not screen, "log lines go above the bar"
            Journal(place.journal).write("refusal", code="dp_required", reason="[bold]no[/bold]")
            live.tick()
        assert handler.stream is screen
    finally:
        logger.removeHandler(handler)
    assert "REFUSED (dp_required): [bold]no[/bold]\n" in screen.getvalue()


def shown(renderable: object) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(renderable)
    output = console.file
    assert isinstance(output, io.StringIO)
    return output.getvalue()
