import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.messages.text import MAX_INTEGER, clean, escape_markdown, one_line, printable


@pytest.mark.parametrize("bad", ["\x1b[2J", "\n", "\u202e", "\u200b", "\ud800", "\u2028", "\x00", "\u00a0"])
def test_what_could_move_a_cursor_or_turn_a_line_becomes_a_space(bad):
    assert printable(f"a{bad[0]}b") == "a b"


def test_plain_words_of_any_script_stay():
    assert printable("Zürich 東京, 100 % é") == "Zürich 東京, 100 % é"


@given(st.text(max_size=2000))
def test_one_line_is_printable_and_short(text):
    line = one_line(text, 40)
    assert line.isprintable()
    assert len(line) == min(len(text), 40)


def test_keys_and_nested_texts_are_cleaned_and_numbers_stay():
    assert clean({"a\n": ["\x1b", 1, 0.5, None, True, {"b": "c"}]}) == {"a ": [" ", 1, 0.5, None, True, {"b": "c"}]}
    assert clean(MAX_INTEGER) == MAX_INTEGER
    with pytest.raises(ValueError, match="64 bits"):
        clean([MAX_INTEGER + 1])


def test_what_a_site_writes_is_no_markup_in_the_model_card():
    hostile = "x | ![a](http://b) <img src=x> **epsilon 0** `c` # d"
    escaped = escape_markdown(hostile)
    assert escaped == r"x \| \!\[a\](http://b) \<img src=x\> \*\*epsilon 0\*\* \`c\` \# d"
    assert escape_markdown("generated images are copies of training images").count("\\") == 0
