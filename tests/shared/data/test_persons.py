"""Which file shows whom: one folder level, one line, or a question to the operator."""

import pytest

from shared.data.persons import doubts, folder_levels, match_identities, person_name, persons_by_folder, summary
from shared.errors import InputError

DEEP = ("top/ward1/ann/1.png", "top/ward1/bob/1.png", "top/ward2/ann/2.png")


def test_levels_are_counted_below_the_common_top_folder():
    assert folder_levels(DEEP) == 2
    assert folder_levels(("top/ann/1.png", "top/bob/1.png")) == 1
    assert folder_levels(("top/1.png", "top/2.png")) == folder_levels(()) == 0


def test_depth_says_which_folder_is_the_person():
    assert persons_by_folder(DEEP) == ("ward1", "ward1", "ward2")
    assert persons_by_folder(DEEP, 2) == ("ann", "bob", "ann"), "one name in two wards is one person"
    assert persons_by_folder(DEEP, 3) is None
    assert persons_by_folder((*DEEP, "top/ward3/loose.png"), 2) is None


def test_lines_may_leave_the_folders_out():
    lines = [(1, "1.png", "ann"), (2, "b/2.png", "bob")]
    assert match_identities(lines, ("a/1.png", "b/2.png")) == ("ann", "bob")
    assert match_identities([*lines, (9, "a/1.png", "ann")], ("a/1.png", "b/2.png")) == ("ann", "bob")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([(4, "a/1.png", "ann"), (8, "a/1.png", "bob")], "lines 4 and 8 give a/1.png to two persons, ann and bob"),
        ([(4, "a/1.png", "ann"), (8, "1.png", "bob")], "lines 4 and 8 give a/1.png to two persons, ann and bob"),
        ([(5, "1.png", "ann")], "line 5 says 1.png, which is a/1.png or b/1.png"),
        ([(4, "a/1.png", "ann")], "no line for 1 of 2 images"),
    ],
)
def test_lines_that_are_not_clear_are_refused_by_number(lines, words):
    with pytest.raises(InputError, match=words):
        match_identities(lines, ("a/1.png", "b/1.png"))


def test_summary_is_what_somebody_who_knows_the_persons_can_check():
    persons = ["gil", "ann", "bob", "ann", "cy", "dee", "eve", "ann"]
    assert summary(persons) == "6 persons, 1 to 3 images each: ann 3, bob 1, cy 1, dee 1, eve 1, ..."
    assert summary(["ann", "bob"]) == "2 persons, 1 to 1 images each: ann 1, bob 1"


@pytest.mark.parametrize(
    ("persons", "words"),
    [
        (["train"] * 3 + ["Val"] * 2, "Val, train: parts of a data set"),
        (["0001", "0002"], "numbered folders"),
        (["ann"] * 60 + ["bob", "cy", "cy"], "ann has 60 images, the median is 2"),
    ],
)
def test_persons_that_are_probably_none_are_doubted(persons, words):
    assert any(words in line for line in doubts(persons))


def test_ordinary_persons_are_not_doubted():
    assert doubts(["ann"] * 9 + ["bob"] + ["2", "3"]) == []


def test_what_looks_the_same_is_one_person():
    """Two spellings of one name would halve what a person is promised."""
    spelled = ("jos\u00e9", "jose\u0301", " jos\u00e9\u00a0", "jos\u00e9\u200b", "\ufeffjos\u00e9")
    assert {person_name(text) for text in spelled} == {"jos\u00e9"}
    assert persons_by_folder(("jos\u00e9/1.png", "jose\u0301/1.png", "bob/1.png")) == ("jos\u00e9", "jos\u00e9", "bob")
    lines = [(1, "1.png", "jos\u00e9"), (2, "2.png", "jose\u0301")]
    assert match_identities(lines, ("1.png", "2.png")) == ("jos\u00e9", "jos\u00e9")
    assert person_name("ann\x1b[2J\tlee\x07") == "ann[2J lee", "names are shown on terminals"
    twice = [(1, "1.png", "jos\u00e9"), (2, "1.png", "jose\u0301")]
    assert match_identities(twice, ("1.png",)) == ("jos\u00e9",)
    assert person_name("\u200b") == "\u200b", "somebody, though nobody can read who"


@pytest.mark.parametrize("twins", [("Anna", "anna"), ("007", "7"), ("12", "12.0")])
def test_names_that_differ_by_case_or_zeros_are_doubted(twins):
    assert any(f"{' and '.join(twins)}: one person or several?" in line for line in doubts([*twins, "x1", "x2"]))
