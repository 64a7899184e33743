"""Guarded entries: how Flower's processes are started, so that none trusts whoever reaches it.

Written against one version of Flower; `tests/deploy/guards` fails on another.
"""

from collections.abc import Mapping
from types import ModuleType

FLWR_VERSION = "1.42.0"


def replace(module: ModuleType, guards: Mapping[str, object]) -> None:
    """Put guards in the place of names of one of Flower's modules.

    Raises:
        RuntimeError: a name is not there, so nothing would call its guard.
    """
    for name, guard in guards.items():
        if not isinstance(module, ModuleType) or name not in vars(module):
            raise RuntimeError(f"{module} has no {name}: this guard is written for Flower {FLWR_VERSION}")
        setattr(module, name, guard)
