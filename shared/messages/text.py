"""Words and numbers of the other side, as they may reach a log, a terminal or a page: cleaned once, at the border.

Every header passes `clean` before a message model sees it, so nothing behind it meets an escape sequence, a second line
or an integer that no number type holds. Ranges are the models' business. Markup (Markdown, HTML) is escaped where it is
written, by whoever writes it.
"""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, Field

MAX_LINE = 500
MAX_INTEGER = 2**63 - 1


def printable(text: str) -> str:
    """`text` with a space in place of everything that is not printable.

    `str.isprintable` is false for what Unicode calls control, format (bidirectional marks, zero width), surrogate,
    private use and unassigned characters, and for every separator but the plain space.
    """
    return text if text.isprintable() else "".join(letter if letter.isprintable() else " " for letter in text)


def one_line(text: str, limit: int = MAX_LINE) -> str:
    """`text` as one printable line of at most `limit` characters."""
    return printable(text[:limit])


def escape_markdown(text: str) -> str:
    """`text` as plain words in Markdown: no link, picture, table cell, heading, emphasis or HTML comes of it."""
    return re.sub(r"([\\`*_\[\]<>|#!])", r"\\\1", printable(text))


def clean(value: Any) -> Any:  # noqa: ANN401  # JSON
    """JSON from the other side, keys and texts printable.

    Raises:
        ValueError: an integer beyond 64 bits.
    """
    match value:
        case str():
            return printable(value)
        case dict():
            return {printable(str(key)): clean(item) for key, item in value.items()}
        case list():
            return [clean(item) for item in value]
        case bool() | None | float():
            return value
        case int() if abs(value) > MAX_INTEGER:
            raise ValueError(f"a number of {value.bit_length()} bits, at most 63 are allowed")
    return value


Line = Annotated[str, Field(max_length=MAX_LINE), AfterValidator(printable)]
"""Free text of the other side: one printable line."""
Figure = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]
"""A figure that is drawn and averaged: finite, and of a size that charts have."""
Epsilon = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
"""An epsilon, or a cap on it; beyond 1e6 it says nothing."""
Rate = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
"""A share, a rate, an AUC."""
