"""typer's help on a terminal, loaded without what none of ours uses. No torch."""

import importlib
import os
import sys
from types import ModuleType

LEAST_COLUMNS = 20
_WIDTHS = ("COLUMNS", "TERMINAL_WIDTH")
_UNUSED = {"rich.markdown": "Markdown", "rich.traceback": "Traceback"}


def load_help() -> None:
    """Load typer's help without a hundred modules, a fifth of its processor time.

    A width in the environment that is no number, or in which no word has room (some terminals and services say 0), is
    taken out of it.
    """
    for name in _WIDTHS:
        width = os.environ.get(name, "")
        if not (width.isascii() and width.isdecimal() and int(width[:9]) >= LEAST_COLUMNS):
            os.environ.pop(name, None)
    if "typer.rich_utils" in sys.modules:
        return
    absent = [name for name in _UNUSED if name not in sys.modules]
    for name in absent:
        sys.modules[name] = ModuleType(name)
        setattr(sys.modules[name], _UNUSED[name], type(_UNUSED[name], (), {}))
    importlib.import_module("typer.rich_utils")
    for name in absent:
        del sys.modules[name]
