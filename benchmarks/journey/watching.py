"""The live page of a host in a real Chromium inside its namespace, looked at again and again while others type."""

import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread

from benchmarks.hosts import Host
from deploy.pages.token import address, read_token
from tests.browser import browser

LOOK_SECONDS = 1.0
WAIT_SECONDS = 60.0
TEXT = "document.body.innerText"


class Seen:
    """What a page has shown: every text that differed from the one before, and what the browser complained of."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.complaints: list[str] = []
        self.problem: BaseException | None = None

    def check(self, *words: str) -> None:
        """Each of `words` has been shown, without a reload and without a complaint.

        Raises:
            RuntimeError: otherwise.
        """
        if self.problem is not None:
            raise RuntimeError(f"the page could not be watched: {self.problem}") from self.problem
        if missing := [word for word in words if not any(word in text for text in self.texts)]:
            raise RuntimeError(f"the live page never showed {missing[0]!r}: {(self.texts or ['nothing'])[-1][-2000:]}")
        if self.complaints:
            raise RuntimeError(f"the browser complains: {self.complaints[0]}")


@contextlib.contextmanager
def watched(host: Host, home: str, port: int) -> Iterator[Seen]:
    """Watch the page of a home on a host while the block runs.

    Args:
        host: where the program runs.
        home: its folder there.
        port: of `--page-port`.
    """
    seen, is_over, is_open = Seen(), Event(), Event()
    url = address(port, read_token(host.folder / home))

    def look() -> None:
        with tempfile.TemporaryDirectory(prefix="profile-", dir=host.folder) as profile:
            try:
                with browser(Path(profile), ("ip", "netns", "exec", host.name)) as window:
                    window.open(url)
                    window.wait("document.querySelector('table, dl, section') !== null", WAIT_SECONDS)
                    while not is_over.is_set():
                        text = str(window.run(TEXT))
                        if text not in seen.texts[-1:]:
                            seen.texts.append(text)
                        is_open.set()
                        time.sleep(LOOK_SECONDS)
                    seen.texts.append(str(window.run(TEXT)))
                    seen.complaints += window.console
            except BaseException as error:  # told by `check`, in the thread that waits
                seen.problem = error
            finally:
                is_open.set()

    thread = Thread(target=look, daemon=True)
    thread.start()
    is_open.wait(WAIT_SECONDS)
    try:
        yield seen
    finally:
        is_over.set()
        thread.join(WAIT_SECONDS)
