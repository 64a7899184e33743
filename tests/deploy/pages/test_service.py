import sys

import pytest

from deploy.observe.logs import FORMAT_VARIABLE
from deploy.pages.service import tell_address
from deploy.pages.token import draw_token


@pytest.mark.parametrize("form", ["", "json"])
def test_the_token_is_shown_on_a_terminal_and_goes_into_no_log(tmp_path, capsys, caplog, monkeypatch, form):
    monkeypatch.setenv(FORMAT_VARIABLE, form)
    caplog.set_level("INFO")
    token = draw_token(tmp_path)
    tell_address(tmp_path, 8123)
    captured = capsys.readouterr()
    assert token not in captured.out + captured.err + caplog.text
    assert "page.token" in captured.out + caplog.text
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    tell_address(tmp_path, 8123)
    captured = capsys.readouterr()
    assert f"http://127.0.0.1:8123/#token={token}" in captured.out
    assert token not in captured.err + caplog.text
