"""Whose picture a file is: persons from class folders or from the lines of an identities file. No torch."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

from shared.errors import InputError

SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"})
"""Folder names of parts of a data set, which are no persons."""
LARGE_FACTOR = 20
"""A person with this many times the median number of images is doubted, from `LARGE_IMAGES` on."""
LARGE_IMAGES = 50
NAMED_PERSONS = 5


def folder_levels(names: Sequence[str]) -> int:
    """Most folders that stand between the common top folder and a file; 0 where no file has one."""
    return max(map(len, _inner_folders(names)), default=0)


def persons_by_folder(names: Sequence[str], depth: int = 1) -> tuple[str, ...] | None:
    """The folder `depth` levels below the common top folder of each file; None when a file has none.

    Folders of one name below different parents are one person: a unit of privacy may be too large, never too small.
    """
    inner = _inner_folders(names)
    if not inner or min(map(len, inner)) < depth:
        return None
    return tuple(person_name(folders[depth - 1]) for folders in inner)


def person_name(text: str) -> str:
    """One spelling of a person for all that look the same: composed letters, nothing invisible, single blanks."""
    composed = unicodedata.normalize("NFC", text)
    shown = (each for each in composed if each.isspace() or unicodedata.category(each) not in ("Cf", "Cc"))
    return " ".join("".join(shown).split()) or text


def match_identities(lines: Iterable[tuple[int, str, str]], names: Sequence[str]) -> tuple[str, ...]:
    """Persons of `names` by `(line number, file name, person)`; a line may leave the folders out.

    Raises:
        InputError: two lines or two files disagree, both named, or files have no line. The text names no path: the
            caller says whose lines these are.
    """
    line_of = _lines_by_name((number, name, person_name(person)) for number, name, person in lines)
    claimed: dict[str, str] = {}
    found, missing = [], []
    for name in names:
        short = PurePosixPath(name).name
        by_path, by_name = line_of.get(name), line_of.get(short)
        if by_path and by_name and by_path[1] != by_name[1]:
            raise _two_lines(by_path, by_name, name)
        if by_name and not by_path and claimed.setdefault(short, name) != name:
            raise InputError(
                f"line {by_name[0]} says {short}, which is {claimed[short]} or {name}: give names with folders"
            )
        if line := by_path or by_name:
            found.append(line[1])
        else:
            missing.append(name)
    if missing:
        raise InputError(
            f"no line for {len(missing)} of {len(names)} images, the first is {missing[0]!r}; give the identity file "
            "of these images"
        )
    return tuple(found)


def summary(persons: Sequence[str]) -> str:
    """How many persons with how many files each, and the first of them by name: for somebody who knows them."""
    counts = Counter(persons)
    first = ", ".join(f"{name} {counts[name]}" for name in sorted(counts)[:NAMED_PERSONS])
    rest = ", ..." if len(counts) > NAMED_PERSONS else ""
    return f"{len(counts)} persons, {min(counts.values())} to {max(counts.values())} images each: {first}{rest}"


def doubts(persons: Sequence[str]) -> list[str]:
    """Why these may be no persons; each a line for the operator."""
    counts = Counter(persons)
    found = [
        f"{' and '.join(sorted(names))}: one person or several? then spell them alike"
        for names in _twins(counts)[:NAMED_PERSONS]
    ]
    if parts := sorted(name for name in counts if name.lower() in SPLIT_NAMES):
        found.append(f"{', '.join(parts)}: parts of a data set rather than persons? then give a depth or identities")
    if len(counts) > 1 and all(name.isdecimal() for name in counts):
        found.append("all names are numbers: numbered folders rather than persons? then give identities")
    median = sorted(counts.values())[len(counts) // 2]
    large = [name for name, count in counts.most_common() if count >= max(LARGE_IMAGES, LARGE_FACTOR * median)]
    if large:
        found.append(f"{large[0]} has {counts[large[0]]} images, the median is {median}: several people in one folder?")
    return found


def _twins(names: Iterable[str]) -> list[list[str]]:
    """Names that differ by what people and spreadsheets change: case, leading zeros, `.0` behind a number."""
    alike: dict[str, list[str]] = {}
    for name in names:
        number = re.fullmatch(r"0*(\d+)(?:\.0+)?", name)
        alike.setdefault(number[1] if number else name.casefold(), []).append(name)
    return [each for each in alike.values() if len(each) > 1]


def _inner_folders(names: Sequence[str]) -> list[tuple[str, ...]]:
    parents = [PurePosixPath(name).parent.parts for name in names]
    shared = 0
    for level in zip(*parents, strict=False):
        if len(set(level)) > 1:
            break
        shared += 1
    return [parts[shared:] for parts in parents]


def _lines_by_name(lines: Iterable[tuple[int, str, str]]) -> dict[str, tuple[int, str]]:
    found: dict[str, tuple[int, str]] = {}
    for number, name, person in lines:
        first = found.setdefault(name, (number, person))
        if first[1] != person:
            raise _two_lines(first, (number, person), name)
    return found


def _two_lines(one: tuple[int, str], other: tuple[int, str], name: str) -> InputError:
    return InputError(
        f"lines {one[0]} and {other[0]} give {name} to two persons, {one[1]} and {other[1]}: keep the one that is right"
    )
