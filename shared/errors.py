"""The one family of errors that a user can cause and cure."""


class InputError(ValueError):
    """Something the user gave is wrong. The text is one line naming the value, the limit and the remedy.

    Both command lines print it without a traceback and exit with code 2.
    """
