"""What a site that leaves takes off this machine, and what it keeps and why."""

import shutil
from pathlib import Path
from typing import NamedTuple

from client.home import Home


class Stays(NamedTuple):
    """A file or folder that a site keeps after it has left."""

    name: str
    why: str


STAYS = (
    Stays("ledger.jsonl", "what was spent stays spent: models that were trained here may be in use for ever"),
    Stays("journal.jsonl", "the record of what was asked, decided and released"),
    Stays("data.key", "with it the same images are known again; without it a later scan counts all as the same data"),
    Stays("site.toml", "the policy, which refuses everything from now on"),
    Stays("approved.txt", "which code and experiments were approved"),
)


def picture_folders(home: Home) -> list[Path]:
    """What holds pictures of the site or numbers made of them: caches, audits, answers, logs that may name files."""
    names = (home.datasets, home.path / "audits", home.replies, home.kept, home.mean_images, home.logs, home.pending)
    files = (home.offers, home.spent, home.path / "page.token")
    return [each for each in (*names, *files) if each.exists() or each.is_symlink()]


def wipe(home: Home) -> list[str]:
    """Remove all that; what was removed, a line each. A link is removed and what it points to is not touched.

    Raises:
        OSError: something could not be removed; what came before it is gone.
    """
    told = []
    for place in picture_folders(home):
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
            told.append(f"removed {place.name}/")
        else:
            pointed = ": it was a link, what it pointed to is still there" if place.is_symlink() else ""
            place.unlink()
            told.append(f"removed {place.name}{pointed}")
    return told


def what_stays(home: Home, head_file: str, data: str) -> list[str]:
    """What is left on this machine, a line each with the reason."""
    lines = [f"stays {each.name}: {each.why}" for each in STAYS if (home.path / each.name).exists()]
    lines.append(f"stays {head_file}: tells an older copy of the ledger from the newest one")
    lines.append(f"stays {data}: your own photographs, which were never touched")
    return [*lines, "stays in this machine's registry: keyed hashes, so that no home gets these images a new budget"]
