from shared.errors import InputError


def test_an_error_is_one_line_whatever_a_name_holds():
    assert str(InputError("no file a\nb\x1b[2J\x9b c é")) == "no file a\\nb\\x1b[2J\\x9b c é"
