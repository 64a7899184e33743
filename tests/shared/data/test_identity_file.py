import codecs

import pytest

from shared.data.identity_file import read_identities
from shared.errors import InputError

NAMES = ("a/1.png", "b/2.png", "b/3 of 4.png")
PLAIN = "a/1.png ann\nb/2.png bob\nb/3 of 4.png bob\n"


def written(tmp_path, content):
    path = tmp_path / "identities.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_identity_file_names_persons_by_file_name_or_path(tmp_path):
    path = written(tmp_path, "000001.jpg 2880\na/000002.jpg 2937\nb/000002.jpg 1\n")
    assert read_identities(path, ("a/000001.jpg", "a/000002.jpg", "b/000002.jpg")) == ("2880", "2937", "1")


@pytest.mark.parametrize(
    "content",
    [
        PLAIN,
        PLAIN.replace("\n", "\r\n"),
        PLAIN.replace("\n", "\r"),
        codecs.BOM_UTF8 + PLAIN.encode(),
        codecs.BOM_UTF16_LE + PLAIN.replace("\n", "\r\n").encode("utf-16-le"),
        codecs.BOM_UTF16_BE + PLAIN.encode("utf-16-be"),
        PLAIN.replace("/", "\\"),
        "./" + PLAIN.replace("\nb", "\n./b"),
        PLAIN.replace("png", "PNG").replace("a/", "A/"),
        "\n\n" + PLAIN.replace("\n", "  \n\n"),
        "file,person\na/1.png,ann\nb/2.png,bob\nb/3 of 4.png,bob\n",
        "a/1.png;ann\nb/2.png;bob\nb/3 of 4.png;bob\n",
        "a/1.png\tann\nb/2.png\tbob\nb/3 of 4.png\tbob\n",
        '"a/1.png","ann"\n"b/2.png","bob"\n"b/3 of 4.png","bob"\n',
        '"a/1.png" ann\n"b/2.png" bob\n"b/3 of 4.png" bob\n',
        "a/1.png,ann,\nb/2.png,bob,\nb/3 of 4.png,bob,\n",
        "1.png ann\n2.png bob\n3 of 4.png bob\n",
        "sep=;\r\nfile;person\r\na/1.png;ann\r\nb/2.png;bob\r\nb/3 of 4.png;bob\r\n",
        "a/1.png;ann\u200b\nb/2.png;bob\u00a0\nb/3 of 4.png; bob\n",
    ],
)
def test_the_file_is_read_as_people_and_their_programs_write_it(tmp_path, content):
    assert read_identities(written(tmp_path, content), NAMES) == ("ann", "bob", "bob")


def test_a_comma_may_be_part_of_a_name(tmp_path):
    path = written(tmp_path, "ann, left.png 1\nann, right.png 2\n")
    assert read_identities(path, ("ann, left.png", "ann, right.png")) == ("1", "2")
    quoted = written(tmp_path, 'name,person\n"ann, left.png",1\n"ann, right.png",2\n')
    assert read_identities(quoted, ("ann, left.png", "ann, right.png")) == ("1", "2")


def test_composed_and_decomposed_letters_are_one_name(tmp_path):
    assert read_identities(written(tmp_path, "jose\u0301.png 7"), ("jos\u00e9.png",)) == ("7",)


def test_another_case_is_not_guessed_where_two_files_differ_by_it(tmp_path):
    path = written(tmp_path, "a.png 1\nA.png 2\n")
    assert read_identities(path, ("A.png", "a.png")) == ("2", "1")
    with pytest.raises(InputError, match="no line for 2 of 2 images"):
        read_identities(written(tmp_path, "A.PNG 1\n"), ("A.png", "a.png"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a.png 1\n000001.jpg", r"line 2: 1 words or columns, not 2"),
        ("a.png 1", "no line for 1 of 1 images"),
        ("000001.jpg,\n", "line 1: the name or the identity is empty"),
        ('x,1\n000001.jpg,"open\n', "line 2: unexpected end of data"),
        ("000001.jpg,1,2,3\n", "line 1: 4 words or columns, not 2"),
        (b"000001.jpg 1\n\xff\xfe\xfa", r"not a text file in UTF-8 or UTF-16 \(line 2\)"),
        (b"0\x000\x000\x00", "zero bytes"),
        (b"\xff\xfea", "not a text file in UTF-8"),
    ],
)
def test_bad_identity_file_is_refused_with_its_line(tmp_path, content, words):
    with pytest.raises(InputError, match=words):
        read_identities(written(tmp_path, content), ("000001.jpg",))


def test_a_missing_identity_file_is_one_line(tmp_path):
    with pytest.raises(InputError, match="not a text file that can be read"):
        read_identities(tmp_path / "none", ())


@pytest.mark.parametrize("lost", ["1.23457E+16", "1,2e+5", "#N/A", "#REF!", "nan", "None", "NULL"])
def test_identities_that_a_program_has_lost_are_refused_with_their_line(tmp_path, lost):
    """All whose number was shortened or is missing would be one person."""
    with pytest.raises(InputError, match=r"line 3: .*(shortened|found no identity)"):
        read_identities(written(tmp_path, f"file;person\na/1.png;ann\nb/2.png;{lost}\nb/3 of 4.png;bob\n"), NAMES)
    others = f"file;person\na/1.png;ann\nb/2.png;bob\nb/3 of 4.png;bob\nelsewhere.png;{lost}\n"
    assert read_identities(written(tmp_path, others), NAMES) == ("ann", "bob", "bob")


@pytest.mark.parametrize("lost", ["NA", "#SPILL!", "#BEZUG!", "#NV", "(null)", "\\N", "2.5E-07"])
def test_other_programs_words_for_nothing_are_no_identity_either(tmp_path, lost):
    with pytest.raises(InputError, match=r"line 2: .*(shortened|found no identity)"):
        read_identities(written(tmp_path, f"a/1.png\tann\nb/2.png\t{lost}\nb/3 of 4.png\tbob\n"), NAMES)


@pytest.mark.parametrize("kept", ["Na", "Nan", "#12", "NATALIE", "12E7x", "n.a."])
def test_names_that_look_like_such_words_are_kept(tmp_path, kept):
    found = read_identities(written(tmp_path, f"a/1.png\t{kept}\nb/2.png\tann\nb/3 of 4.png\tbob\n"), NAMES)
    assert found == (kept, "ann", "bob")


def test_numbers_that_a_spreadsheet_has_rounded_are_refused(tmp_path):
    """It keeps 15 digits: 1234567890123456 and 1234567890123457 are both written as 1234567890123450."""
    rounded = "a/1.png,1234567890123450\nb/2.png,1234567890123460\nb/3 of 4.png,bob\n"
    with pytest.raises(InputError, match=r"line 1: no number has more than 15 digits .* rounded"):
        read_identities(written(tmp_path, rounded), NAMES)
    whole = rounded.replace("60\n", "61\n")
    assert read_identities(written(tmp_path, whole), NAMES) == ("1234567890123450", "1234567890123461", "bob")
    short = "a/1.png,100000000000000\nb/2.png,7\nb/3 of 4.png,bob\n"
    assert read_identities(written(tmp_path, short), NAMES)[0] == "100000000000000", "15 digits are kept"
