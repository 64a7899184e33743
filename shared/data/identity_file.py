"""Files that say who is on which image, as people's programs write them: text, CSV, Excel, Windows. No torch."""

import codecs
import csv
import re
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from shared.data.persons import match_identities
from shared.errors import InputError

Line = tuple[int, str, str]
"""Number in the file from 1, file name, person."""

_REMEDY = "give `<file name> <identity>` lines, or CSV with these two columns"
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_SEPARATORS = ("", "\t", ",", ";")
_COLUMNS = 2
# `sep=;` in the first line is Excel's own; the rest is what spreadsheets and data frames write where they lost a value.
_EXCEL_SEPARATOR = re.compile(r'"?sep=.?"?[,;]*', re.IGNORECASE)
_SHORTENED = re.compile(r"-?\d+(?:[.,]\d+)?E\+\d+|-?\d[.,]\d+E-\d+", re.IGNORECASE)
_ERROR = re.compile(r"#[A-ZÀ-Ý][A-ZÀ-Ý0-9/_]*[!?]|#(?:N/A|NV|N/D|ND|I/T)")
_NO_VALUE = frozenset({"N/A", "NA", "<NA>", "nan", "NaN", "NAN", "NaT", "None", "null", "NULL", "(null)", "\\N"})
_NO_VALUE |= {"nil", "undefined"}
_EXACT_DIGITS = 15
"""A spreadsheet keeps so many of a number, and writes zeros for the rest."""


def read_identities(path: Path, names: tuple[str, ...]) -> tuple[str, ...]:
    """Persons of `names` from a text file with `<file name> <identity>` lines, as CelebA's `identity_CelebA.txt`.

    Also CSV with commas, semicolons or tabs, quoted names, a header, byte order marks, UTF-16, Windows' line ends and
    backslashes, `./`, and another case or Unicode form of a name where that is not ambiguous.

    Raises:
        InputError: not such a file, a line that is no pair, lines that disagree (both named), or files without a line.
    """
    lines = read_lines(path, names)
    try:
        return match_identities(lines, names)
    except InputError as error:
        raise InputError(f"identities {path}: {error}") from error


def read_lines(path: Path, names: tuple[str, ...]) -> list[Line]:
    """The lines of an identity file, file names spelled as those of the images where a line means one of them.

    Raises:
        InputError: not a text file, or a line that is no pair.
    """
    text = _text(path)
    spelling = _spellings(names)
    rows = [(number, row) for number, row in enumerate(re.split(r"\r\n|\r|\n", text), 1) if row.strip()]
    rows = rows[1:] if rows and _EXCEL_SEPARATOR.fullmatch(rows[0][1].strip()) else rows
    # A comma may be part of a name: the separator under which most names are those of images is the file's.
    separator = max(_SEPARATORS, key=lambda each: _fit([_pair(row, each) for _, row in rows], spelling))
    lines = []
    for number, row in rows:
        name, person, problem = _pair(row, separator)
        if problem := problem or (_lost(person) if _key(name) in spelling else ""):
            raise InputError(f"identities {path}, line {number}: {problem}; {_REMEDY}")
        lines.append((number, spelling.get(_key(name)) or _clean(name), person))
    if (rounded := _rounded(lines)) is not None:
        problem = f"no number has more than {_EXACT_DIGITS} digits that are not 0: a spreadsheet has rounded them"
        raise InputError(f"identities {path}, line {rounded}: {problem}; make their column text and save it again")
    return lines


def _rounded(lines: list[Line]) -> int | None:
    """Line of the first long number where all of them end in zeros: persons who differ there would be one."""
    long = [(number, person) for number, _, person in lines if person.isdecimal() and len(person) > _EXACT_DIGITS]
    is_rounded = all(not person[_EXACT_DIGITS:].strip("0") for _, person in long)
    return long[0][0] if long and is_rounded else None


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        encoding = next((encoding for mark, encoding in _MARKS if data.startswith(mark)), "utf-8")
        text = data.decode(encoding)
    except OSError as error:
        raise InputError(
            f"identities {path}: not a text file that can be read ({error.strerror}); {_REMEDY}"
        ) from error
    except UnicodeDecodeError as error:
        number = data[: error.start].count(b"\n") + 1
        raise InputError(
            f"identities {path}: not a text file in UTF-8 or UTF-16 (line {number}); save it as UTF-8 text"
        ) from error
    if "\0" in text:
        raise InputError(f"identities {path}: not a text file (it holds zero bytes); save it as UTF-8 text")
    return text


def _fit(pairs: list[tuple[str, str, str]], spelling: Mapping[str, str]) -> tuple[int, int]:
    """How many lines name an image, and how many are pairs."""
    return sum(_key(name) in spelling for name, _, _ in pairs), sum(not problem for _, _, problem in pairs)


def _pair(row: str, separator: str) -> tuple[str, str, str]:
    """Name and person of a line, and what is wrong with it."""
    if separator:
        try:
            cells = [cell.strip() for cell in next(csv.reader([row], delimiter=separator, strict=True))]
        except csv.Error as error:
            return "", "", str(error)
        while len(cells) > _COLUMNS and not cells[-1]:
            cells.pop()
    else:
        quoted = re.fullmatch(r'\s*"([^"]+)"\s+(\S+)\s*', row)
        cells = list(quoted.groups()) if quoted else row.strip().rsplit(maxsplit=1)
    if len(cells) != _COLUMNS:
        return cells[0] if cells else "", "", f"{len(cells)} words or columns, not 2"
    name, person = cells[0], cells[1].strip('"')
    return name, person, "" if name and person else "the name or the identity is empty"


def _lost(person: str) -> str:
    """Why this cannot be who it was: two persons would be one."""
    if _SHORTENED.fullmatch(person):
        return f"{person} is a number that a spreadsheet has shortened: make its column text and save it again"
    is_lost = person in _NO_VALUE or _ERROR.fullmatch(person)
    return f"{person} stands where a program found no identity" if is_lost else ""


def _spellings(names: Iterable[str]) -> dict[str, str]:
    """Every way to write a name or its last part, to that of the images; ways that mean two files are left out."""
    found: dict[str, str] = {}
    ambiguous = set()
    for name in names:
        for own in dict.fromkeys((name, PurePosixPath(name).name)):
            if found.setdefault(_key(own), own) != own:
                ambiguous.add(_key(own))
    return {key: own for key, own in found.items() if key not in ambiguous}


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", _clean(name)).casefold()


def _clean(name: str) -> str:
    return str(PurePosixPath(name.replace("\\", "/"))) if name else ""
