"""What goes wrong with keys, files, ports and programs, and how it is said."""


class ProvisionError(ValueError):
    """Something about keys, files, ports or programs is wrong. One line: the value, the limit and the remedy."""
