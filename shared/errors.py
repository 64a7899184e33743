"""The one family of errors that a user can cause and cure."""

_ESCAPES = {code: ascii(chr(code))[1:-1] for code in (*range(32), *range(127, 160))}


class InputError(ValueError):
    """Something the user gave is wrong. The text is one line naming the value, the limit and the remedy.

    Both command lines print it without a traceback and exit with code 2. Control characters, which names of files and
    texts of other programs may hold, are written as escapes: what is told stays one line and moves no cursor.
    """

    def __str__(self) -> str:
        """The text, with control characters as escapes."""
        return super().__str__().translate(_ESCAPES)
