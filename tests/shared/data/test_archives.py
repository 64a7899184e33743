import zipfile

import pytest

from shared.data.images import list_images
from shared.errors import InputError


def cut(data):
    return data[: len(data) // 2]


def without_directory(data):
    return data.replace(b"PK\1\2", b"XX\1\2", 1)


def two_in_a_row(data):
    return data + data


def fewer_than_its_end_counts(data):
    end = data.rindex(b"PK\5\6")
    return data[: end + 10] + b"\x09\0" + data[end + 12 :]


def one_unlisted(data):
    # The directory loses its first entry, and its end says so: the member itself is still in the file.
    first, second = data.index(b"PK\1\2"), data.index(b"PK\1\2", data.index(b"PK\1\2") + 1)
    end = data.rindex(b"PK\5\6")
    size = end - second
    record = data[end : end + 8] + b"\1\0\1\0" + size.to_bytes(4, "little") + data[end + 16 :]
    return data[:first] + data[second:end] + record


def with_bytes_behind(data):
    return data + b"junk" * 9


def last_half(data):
    return data[len(data) // 2 - 8 :]


def part_of_a_split_one(data):
    end = data.rindex(b"PK\5\6")
    return data[: end + 4] + b"\1\0\1\0" + data[end + 8 :]


def encrypted(data):
    data = bytearray(data)
    data[data.index(b"PK\3\4") + 6] |= 1
    data[data.index(b"PK\1\2") + 8] |= 1
    return bytes(data)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut, "damaged or incomplete zip"),
        (without_directory, "damaged or incomplete zip"),
        (two_in_a_row, "members that its directory does not list"),
        (one_unlisted, "members that its directory does not list"),
        (fewer_than_its_end_counts, "its end counts 9 members, its directory has 2"),
        (with_bytes_behind, "bytes behind its end"),
        (last_half, "its beginning is missing"),
        (part_of_a_split_one, "one part of a split archive"),
        (encrypted, "is encrypted"),
    ],
)
def test_archives_that_may_hide_images_are_refused_with_the_reason(tmp_path, damage, words):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("1.png", b"one picture " * 9)
        archive.writestr("2.png", b"another one " * 9)
    assert len(list_images(path).names) == 2
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=words):
        list_images(path)
