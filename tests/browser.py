"""A headless Chromium that tests talk to through two pipes: no driver, no port, no package."""

import base64
import contextlib
import itertools
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.needs import need_binary

ANSWER_SECONDS = 60.0


class Browser:
    """One window; `console` collects what the page complains of."""

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read = write, read
        self._numbers, self._rest = itertools.count(1), b""
        self._session = ""
        self.console: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the DevTools protocol and its answer; events on the way are noted."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        for answer in self._messages():
            if answer.get("id") == number:
                assert "error" not in answer, answer["error"]
                result: dict[str, Any] = answer["result"]
                return result
            self._note(answer)
        raise AssertionError("the browser has ended")

    def _messages(self) -> Iterator[dict[str, Any]]:
        deadline = time.monotonic() + ANSWER_SECONDS
        while time.monotonic() < deadline:
            head, mark, rest = self._rest.partition(b"\0")
            if mark:
                self._rest = rest
                yield json.loads(head)
            else:
                part = os.read(self._read, 2**20)
                if not part:
                    return
                self._rest += part

    def _note(self, event: dict[str, Any]) -> None:
        told = event.get("params", {})
        match event.get("method"):
            case "Runtime.consoleAPICalled":
                self.console.append(str(told["args"]))
            case "Runtime.exceptionThrown":
                self.console.append(str(told["exceptionDetails"]))
            case "Log.entryAdded":
                self.console.append(str(told["entry"]["text"]))
            case "Network.requestWillBeSent":
                self.requests.append(told["request"]["url"])

    def open(self, url: str, width: int = 1400, height: int = 900, *, dark: bool = False) -> None:
        """Go to a page in a window of this size."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=url)

    def run(self, script: str) -> Any:  # JSON
        """The value of an expression on the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, script: str, seconds: float = ANSWER_SECONDS) -> Any:  # JSON
        """The value of an expression as soon as it is true."""
        deadline = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < deadline, f"never true: {script}; {self.console}"
            time.sleep(0.05)
        return value

    def press(self, key: str) -> None:
        """One key, as from a keyboard."""
        codes, texts = {"Tab": 9, "Enter": 13}, {"Enter": {"text": "\r"}}
        for kind, text in (("keyDown", texts.get(key, {})), ("keyUp", {})):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key], **text)

    def roles(self) -> list[tuple[str, str]]:
        """Role and name of everything that a screen reader is told, in order."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        told = [each for each in nodes if not each.get("ignored")]
        return [(each["role"]["value"], each.get("name", {}).get("value", "")) for each in told]

    def shot(self, path: Path) -> None:
        """A picture of the whole page."""
        taken = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(taken["data"]))

    def printed(self, path: Path) -> None:
        """The page as a PDF of A4."""
        taken = self.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69, preferCSSPageSize=True)
        path.write_bytes(base64.b64decode(taken["data"]))


@contextlib.contextmanager
def browser(profile: Path, inside: Sequence[str] = ()) -> Iterator[Browser]:
    """A Chromium with an empty profile; without one on this machine the test is skipped, or fails in CI.

    Args:
        profile: an empty folder.
        inside: words before the program, such as those that enter a network namespace.
    """
    chromium = need_binary("chromium")
    (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
    command = [*inside, chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--remote-debugging-pipe", f"--user-data-dir={profile}"]
    with subprocess.Popen(
        command,
        preexec_fn=_at(theirs_in, theirs_out),  # noqa: PLW1509 - two system calls
        close_fds=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            yield Browser(ours_out, ours_in)
        finally:
            process.kill()
            os.close(ours_out)
            os.close(ours_in)


def _at(reading: int, writing: int) -> Callable[[], None]:
    """Chromium reads commands from descriptor 3 and writes answers to 4."""

    def place() -> None:
        kept = [os.dup(reading), os.dup(writing)]
        while min(kept) <= 4:  # neither may lie where the other has to
            kept = [os.dup(each) if each <= 4 else each for each in kept]
        os.dup2(kept[0], 3)
        os.dup2(kept[1], 4)

    return place
