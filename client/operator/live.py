"""A running site on a terminal: events scroll by, one line below says what is going on. No torch."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, ConsoleRenderable, RichCast
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.spinner import Spinner

from client.home import Home
from client.operator.status import SiteView
from client.training.progress import read_progress

TICK_SECONDS = 0.5


class LiveView:
    """What is going on: a bar while a round is trained, else that the site waits; call `tick` about twice a second."""

    def __init__(self, home: Home, console: Console) -> None:
        self._home = home
        self._view = SiteView(home, lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True))
        self._idle = Spinner("dots", "waiting for requests")
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps,"),
            TimeElapsedColumn(),
            TextColumn("gone,"),
            TimeRemainingColumn(),
            TextColumn("to go"),
            console=console,
        )
        self._round: tuple[str, int] | None = None

    def tick(self) -> None:
        """Print new events above, move the bar."""
        self._view.show_new()
        now = read_progress(self._home)
        if now is None:
            self._round = None
            return
        if self._round != now[:2]:
            for old in self._bar.task_ids:
                self._bar.remove_task(old)
            self._bar.add_task(escape(f"run {now.run} round {now.server_round}"), total=now.steps)
            self._round = now[:2]
        self._bar.update(self._bar.task_ids[0], completed=now.steps_done)

    def render(self) -> ConsoleRenderable | RichCast:
        """The last line of the screen."""
        return self._bar if self._round else self._idle


@contextmanager
def live_view(home: Home, console: Console | None = None) -> Iterator[LiveView]:
    """Show a site on the terminal for as long as the block runs."""
    console = console or Console()
    view = LiveView(home, console)
    with Live(get_renderable=view.render, console=console, transient=True, refresh_per_second=4), _logs_above():
        yield view


@contextmanager
def _logs_above() -> Iterator[None]:
    """Send what is logged to standard error through the live view, which it would tear otherwise."""
    handlers = [each for each in logging.getLogger().handlers if isinstance(each, logging.StreamHandler)]
    before = [each.setStream(sys.stderr) for each in handlers]
    try:
        yield
    finally:
        for each, stream in zip(handlers, before, strict=True):
            each.setStream(stream or sys.stderr)
