"""Words and numbers of the other side, as they may reach a log, a terminal or a page: cleaned once, at the border.

A message model declares its fields with these types, so nothing behind it meets an escape sequence, a second line or a
number that no chart can draw. Markup (Markdown, HTML) is escaped where it is written, by whoever writes it.
"""

MAX_LINE = 500


def one_line(text: str, limit: int = MAX_LINE) -> str:
    """`text` as one line of at most `limit` printable characters; all others become spaces.

    `str.isprintable` refuses what Unicode calls control, format (bidirectional marks, zero width), surrogate, private
    use, unassigned, and every separator but the plain space.
    """
    return "".join(letter if letter.isprintable() else " " for letter in text[:limit])
