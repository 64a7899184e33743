"""The files that make up every page: one look for reports, records and live pages; no asset from elsewhere."""

from functools import cache
from importlib.resources import files


@cache
def style() -> str:
    """CSS of all pages, light and dark, for screen and print."""
    return _text("style.css")


def live_files() -> dict[str, tuple[str, bytes]]:
    """The empty live page and what it loads: media type and content, by path."""
    return {
        "/": ("text/html; charset=utf-8", _text("live.html").encode()),
        "/style.css": ("text/css; charset=utf-8", (style() + _text("live.css")).encode()),
        "/live.js": ("text/javascript; charset=utf-8", _text("live.js").encode()),
        "/icon.svg": ("image/svg+xml", _text("icon.svg").encode()),
    }


def _text(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")
