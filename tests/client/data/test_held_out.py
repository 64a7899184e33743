"""Sides are decided per person, once: no unit depends on another one, nothing that was held out is trained on."""

import secrets

from hypothesis import given
from hypothesis import strategies as st

from client.data.held_out import Picture, Split

KEY = bytes(32)
# Few pictures and few persons, so that many pictures are filed twice, also under several persons.
FILED = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 8), st.integers(0, 1)), min_size=1, max_size=24)
RATIO = st.sampled_from([0.0, 0.3, 0.6])


def pictures_of(filed: list[tuple[int, int, int]]) -> list[Picture]:
    """Pictures as (person, pixels, encoding): one picture may come as two files with other bytes."""
    return [
        Picture(row, (f"bytes {pixels} {encoding}", f"pixels {pixels}"), f"person {person}")
        for row, (person, pixels, encoding) in enumerate(filed)
    ]


def units(split: Split, pictures: list[Picture], ratio: float) -> dict[str, set[str]]:
    """Pixels that each training person contributes, and that each picture is in it once."""
    sides = split.divide(KEY, pictures, ratio)
    by_row = {each.row: each for each in pictures}
    found: dict[str, list[str]] = {}
    for row in [*sides.train, *sides.twins]:
        found.setdefault(str(by_row[row].person), []).append(by_row[row].records[1])
    assert all(len(set(unit)) == len(unit) for unit in found.values()), "a copy inside one person is dropped"
    return {person: set(unit) for person, unit in found.items()}


@given(FILED, RATIO, st.integers(0, 5))
def test_removing_a_person_changes_no_other_unit(filed: list[tuple[int, int, int]], ratio: float, gone: int):
    whole = units(Split(), pictures_of(filed), ratio)
    rest = units(Split(), pictures_of([each for each in filed if each[0] != gone]), ratio)
    assert rest == {person: unit for person, unit in whole.items() if person != f"person {gone}"}


@given(FILED, FILED, RATIO, RATIO)
def test_what_was_held_out_is_never_trained_on_and_the_other_way_round(
    first: list[tuple[int, int, int]], second: list[tuple[int, int, int]], ratio: float, other_ratio: float
):
    split, placed = Split(), {}
    for filed, each_ratio in ((first, ratio), (second, other_ratio)):
        pictures = pictures_of(filed)
        sides = split.divide(KEY, pictures, each_ratio)
        by_row = {each.row: each for each in pictures}
        for rows, place in ((sides.train + sides.twins, False), (sides.held_out, True)):
            for row in rows:
                assert placed.setdefault(by_row[row].records[1], place) == place


@given(FILED)
def test_every_file_is_remembered_copies_too(filed: list[tuple[int, int, int]]):
    split, pictures = Split(), pictures_of(filed)
    split.divide(KEY, pictures, 0.3)
    assert split.records.keys() == {record for each in pictures for record in each.records}
    assert not split.is_regrouped(pictures)


@given(FILED)
def test_pictures_under_other_persons_only_are_regrouped(filed: list[tuple[int, int, int]]):
    split, pictures = Split(), pictures_of(filed)
    split.divide(KEY, pictures, 0.3)
    assert split.is_regrouped([each._replace(person=f"other {each.person}") for each in pictures])
    assert split.is_regrouped([each._replace(person=None) for each in pictures])
    added = [each._replace(row=100 + each.row, person="new") for each in pictures]
    assert not split.is_regrouped([*pictures, *added])


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 1)), min_size=1, max_size=24), RATIO)
def test_without_persons_each_picture_is_there_once(filed: list[tuple[int, int]], ratio: float):
    pictures = [each._replace(person=None) for each in pictures_of([(0, *each) for each in filed])]
    sides = Split().divide(KEY, pictures, ratio)
    pixels = [pictures[row].records[1] for row in [*sides.train, *sides.held_out]]
    assert sorted(pixels) == sorted({each.records[1] for each in pictures})
    assert sides.twins == []


def test_a_person_that_is_new_by_name_goes_where_its_pictures_were():
    split = Split()
    pictures = [Picture(row, (f"b{row}", f"p{row}"), "ann") for row in range(3)]
    split.persons["ann"] = True
    assert split.divide(KEY, pictures, 0.0).held_out == [0, 1, 2]
    renamed = [each._replace(person="annie") for each in [*pictures, Picture(3, ("b3", "p3"), "annie")]]
    assert split.divide(KEY, renamed, 0.0).held_out == [0, 1, 2, 3]


def test_share_of_persons_follows_the_ratio_and_the_key():
    pictures = [Picture(row, (f"b{row}", f"p{row}"), f"person {row}") for row in range(2000)]
    held_out = Split().divide(KEY, pictures, 0.3).held_out
    # Binomial: six standard deviations of 2,000 draws.
    assert abs(len(held_out) - 600) < 6 * (2000 * 0.3 * 0.7) ** 0.5
    assert Split().divide(secrets.token_bytes(32), pictures, 0.3).held_out != held_out


def test_split_comes_back_as_it_was_saved(tmp_path):
    split = Split(key_id="k")
    split.divide(KEY, pictures_of([(0, 1, 0), (1, 1, 0), (1, 2, 0)]), 0.3)
    (tmp_path / "split.json").write_bytes(split.dump())
    assert Split.load(tmp_path / "split.json") == split
