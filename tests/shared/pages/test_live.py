"""The live page's script in a browser: what it draws, for eyes, keyboards and screen readers."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from deploy.pages.application import Application
from deploy.pages.serve import server_of
from shared.pages.assets import live_files
from shared.pages.parts import cell, chart, facts, lines, pictures, table, title
from shared.storage.synthetic_mark import SyntheticMark, marked_png
from tests.browser import Browser, browser

TOKEN = "k" * 43
HOSTILE = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"


class Shown:
    """A page with every kind of part, and 40 sites."""

    def __init__(self) -> None:
        from PIL import Image

        self.files = live_files()
        self.round = 1
        self.png = marked_png(Image.new("RGB", (64, 32), "teal"), SyntheticMark())

    def read(self) -> list[dict[str, Any]]:
        sites = [[f"site-{k:02d}", cell("online", "answered"), cell(f"{k} of 40", share=k / 40)] for k in range(1, 41)]
        xs = list(range(1, self.round + 20))
        curves = [(f"site-{k}", xs, [k + x / 10 for x in xs]) for k in range(3)]
        return [
            title("Coordinator fleet.example"),
            facts("now", "Now", [("round", str(self.round)), ("asked", HOSTILE)]),
            table("sites", "Sites", ["site", "now", "epsilon"], sites, text_columns=["now"]),
            chart("epsilon", "Epsilon", "round", curves, limits=[("cap 8", 8.0)]) or {},
            lines("problems", f"Problems {HOSTILE}", [(HOSTILE, "failed")]),
            pictures("grids", "Grids", [("run.1", "round 1")]),
            table("empty", "Nothing", ["a"], [], empty="no site yet"),
        ]

    def picture(self, name: str) -> bytes | None:
        return self.png if name == "run.1" else None


@pytest.fixture(scope="module")
def shown() -> Iterator[tuple[Shown, int]]:
    source = Shown()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = server_of(Application(source, TOKEN))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening.dup()])))
        thread.start()
        yield source, listening.getsockname()[1]
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def show(window: Browser, port: int, width: int = 1400, *, dark: bool = False) -> None:
    window.open("about:blank")
    window.open(f"http://127.0.0.1:{port}/#token={TOKEN}", width, dark=dark)
    window.wait("document.querySelectorAll('#parts > section').length === 6")
    window.wait("document.querySelector('img')?.naturalWidth === 64")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1400])
def test_everything_is_drawn_inside_the_window_without_complaint(
    window: Browser, shown: tuple[Shown, int], width: int, dark: bool
):
    show(window, shown[1], width, dark=dark)
    assert window.console == []
    assert window.run("document.documentElement.scrollWidth") == width
    assert window.run("document.querySelectorAll('#part-sites tbody tr').length") == 40
    assert window.run("document.querySelectorAll('#part-epsilon polyline').length") == 3
    background = window.run("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(20, 23, 26)" if dark else "rgb(247, 247, 245)")
    assert window.run("document.querySelector('#part-sites .gauge i').style.width") == "2.5%"


IS_CUT = """[...document.querySelectorAll('svg.chart text')].filter((text) => {
  const [own, whole] = [text.getBoundingClientRect(), text.ownerSVGElement.getBoundingClientRect()];
  return own.left < whole.left - 1 || own.right > whole.right + 1 || own.bottom > whole.bottom + 1;
}).map((text) => text.textContent)"""


def test_no_number_at_a_charts_edge_is_cut_off(window: Browser, shown: tuple[Shown, int]):
    source, port = shown
    source.round = 1981  # the newest of 2,000 rounds is the last number of the axis
    for width in (400, 1400):
        show(window, port, width)
        ticks = window.run("[...document.querySelectorAll('#part-epsilon text')].map((text) => text.textContent)")
        assert "2000" in ticks and window.run(IS_CUT) == []
    source.round = 1


def test_the_token_leaves_the_address_and_nothing_is_asked_of_others(window: Browser, shown: tuple[Shown, int]):
    window.requests.clear()
    show(window, shown[1])
    assert window.run("location.href") == f"http://127.0.0.1:{shown[1]}/"
    own = (f"http://127.0.0.1:{shown[1]}/", f"blob:http://127.0.0.1:{shown[1]}/", "about:blank")
    asked = [url for url in window.requests if not url.endswith(f"#token={TOKEN}")]
    assert asked and all(url.startswith(own) and TOKEN not in url for url in asked)


def test_texts_of_others_are_shown_and_never_run(window: Browser, shown: tuple[Shown, int]):
    show(window, shown[1])
    assert window.run("document.querySelector('#part-problems li').textContent") == HOSTILE
    assert window.run("document.querySelectorAll('img').length") == 1
    assert window.run("document.title") == "Coordinator fleet.example – maskfed live"


def test_a_screen_reader_is_told_headings_tables_shares_and_charts(window: Browser, shown: tuple[Shown, int]):
    show(window, shown[1])
    roles = window.roles()
    for expected in (
        ("heading", "Coordinator fleet.example"),
        ("heading", "Sites"),
        ("region", "Sites"),
        ("columnheader", "epsilon"),
        ("rowheader", "site-07"),
        ("meter", "share of the cap"),
        ("image", "Generated faces, round 1"),
    ):
        assert expected in roles
    assert any(role == "image" and name.startswith("Epsilon; newest: site-0 ") for role, name in roles)
    assert ("status", "") in roles or any(role == "status" for role, _ in roles)


def test_the_keyboard_reaches_what_scrolls_and_an_update_keeps_its_place(window: Browser, shown: tuple[Shown, int]):
    source, port = shown
    show(window, port, 400)
    reached = []
    for _ in range(6):
        window.press("Tab")
        reached.append(
            window.run("document.activeElement.getAttribute('aria-label') || document.activeElement.textContent")
        )
    assert reached[0] == "Skip to the figures" and "Sites" in reached
    window.run("document.querySelector('#part-sites .scroll').focus()")
    source.round += 1
    window.wait(f"document.querySelector('#part-now dd').textContent === '{source.round}'")
    assert window.run("document.activeElement.getAttribute('aria-label')") == "Sites"


def test_without_the_right_token_the_page_asks_for_it(window: Browser, shown: tuple[Shown, int]):
    window.open("about:blank")
    window.open(f"http://127.0.0.1:{shown[1]}/#token=wrong")
    window.wait("document.getElementById('ask')?.hidden === false")
    assert window.run("document.querySelectorAll('#parts > section').length") == 0
    assert window.run("document.activeElement.id") == "token"
    window.run(f"document.getElementById('token').value = '{TOKEN}'")
    window.press("Tab")
    window.press("Enter")
    window.wait("document.querySelectorAll('#parts > section').length === 6")
    window.console.clear()
