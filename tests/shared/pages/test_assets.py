import re

from shared.pages.assets import live_files, style


def test_the_live_page_loads_its_own_files_only():
    files = live_files()
    page = files["/"][1].decode()
    assert set(re.findall(r'(?:href|src)="([^"#]+)"', page)) == files.keys() - {"/"}
    everything = b"".join(content for _, content in files.values()).decode()
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", everything) and "@import" not in everything


def test_no_script_or_style_stands_in_the_page_itself():
    page = live_files()["/"][1].decode()
    assert "<style" not in page and not re.search(r"<script(?![^>]*src=)|\son\w+=|style=", page)


def test_the_script_makes_no_markup_of_texts():
    script = live_files()["/live.js"][1].decode()
    for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "DOMParser"):
        assert sink not in script


def test_the_token_is_kept_in_no_place_that_outlives_the_window():
    script = live_files()["/live.js"][1].decode()
    assert "localStorage" not in script and "cookie" not in script and "history.replaceState" in script


def test_all_pages_share_one_look():
    assert "--series-1" in style() and "prefers-color-scheme: dark" in style() and "@media print" in style()
