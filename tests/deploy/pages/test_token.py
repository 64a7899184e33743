import stat

import pytest

from deploy.errors import ProvisionError
from deploy.pages.token import TOKEN_FILE, address, draw_token, read_token


def test_a_token_is_private_new_at_each_start_and_long(tmp_path):
    first, second = draw_token(tmp_path), draw_token(tmp_path)
    assert first != second and read_token(tmp_path) == second
    assert stat.S_IMODE((tmp_path / TOKEN_FILE).stat().st_mode) == 0o600
    assert len(second) >= 43  # 32 random bytes


def test_a_token_that_others_can_read_is_refused(tmp_path):
    draw_token(tmp_path)
    (tmp_path / TOKEN_FILE).chmod(0o640)
    with pytest.raises(ProvisionError, match="0640"):
        read_token(tmp_path)


@pytest.mark.parametrize("text", ["", "\n", "short"])
def test_an_empty_or_guessable_token_is_refused(tmp_path, text):
    draw_token(tmp_path)
    (tmp_path / TOKEN_FILE).write_text(text)
    with pytest.raises(ProvisionError, match="holds no token"):
        read_token(tmp_path)


def test_a_link_in_the_tokens_place_is_replaced_and_not_followed(tmp_path):
    other = tmp_path / "other"
    other.write_text("kept")
    (tmp_path / TOKEN_FILE).symlink_to(other)
    token = draw_token(tmp_path)
    assert other.read_text() == "kept" and read_token(tmp_path) == token


def test_the_address_shows_the_token_to_no_server(tmp_path):
    before, mark, after = address(8123, "abc").partition("#")
    assert (before, mark, after) == ("http://127.0.0.1:8123/", "#", "token=abc")
