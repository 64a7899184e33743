"""The experiment files that ship with the project: recipes that both sides find by name."""

from itertools import takewhile
from pathlib import Path
from textwrap import shorten

from shared.errors import InputError

FOLDER = Path(__file__).parents[2] / "server" / "experiments"


def recipe_names() -> list[str]:
    """Names of all recipes, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def describe(name: str) -> str:
    """First sentence of the comment that a recipe opens with, at most 160 characters."""
    lines = (FOLDER / f"{name}.toml").read_text(encoding="utf-8").splitlines()
    comment = " ".join(line.removeprefix("#").strip() for line in takewhile(lambda line: line.startswith("#"), lines))
    return shorten(comment.split(". ")[0].removesuffix("."), 160, placeholder=" ...")


def find_experiment(name: str) -> Path:
    """The file that `name` means: a path, or a recipe's name.

    Raises:
        InputError: neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    recipe = FOLDER / f"{name}.toml"
    if recipe.is_file():
        return recipe
    raise InputError(f"experiment {name!r}: no such file or recipe; `maskfed-server experiments list` shows them")
