import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("shared", "client", "server", "deploy")
ROWS = [line for line in (ROOT / "shared" / "README.md").read_text().splitlines() if line.startswith("| ")][2:]


def test_the_map_has_the_papers_equations():
    text = "\n".join(ROWS)
    assert all(f"Eq. {number}" in text for number in (1, 2, 3, 4))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip()[:30])
def test_each_row_of_the_map_names_functions_and_tests_that_exist(row):
    _, equation, functions, tests, _ = row.split("|")
    assert equation.strip()
    for name in re.findall(r"`([^`]+)`", functions):
        module, _, attribute = name.rpartition(".")
        package = module if module.startswith("server.") else f"shared.{module}"
        assert hasattr(importlib.import_module(package), attribute), name
    names = re.findall(r"`([^`]+)`", tests)
    assert names
    for name in names:
        file, _, function = name.partition("::")
        path = ROOT / file if file.startswith("tests/") else ROOT / "tests" / "shared" / file
        assert re.search(rf"^def {function}\(", path.read_text(), re.MULTILINE), name


def tree_of(readme: str) -> dict[str, str]:
    """The tree at the head of a README: path (folders end with a slash) to what is said of it."""
    found, folders = {}, []
    block = readme.split("```")[1].strip("\n").splitlines()
    for line in block[1:]:
        name, _, text = line.strip().partition(" ")
        depth = (len(line) - len(line.lstrip())) // 2
        folders[depth - 1 :] = [name] if name.endswith("/") else []
        path = "".join(folders) if name.endswith("/") else "".join([*folders[: depth - 1], name])
        assert path not in found, path
        found[path] = text.strip()
    return found


def test_a_tree_is_read_by_its_indentation():
    text = "# Title\n\n```\ntop/\n  one.py    first\n  sub/      folder\n    two.py  second\n  last.py   third\n```\n"
    assert tree_of(text) == {"one.py": "first", "sub/": "folder", "sub/two.py": "second", "last.py": "third"}


@pytest.mark.parametrize("package", PACKAGES)
def test_the_tree_of_a_package_has_one_line_per_entry(package):
    folder = ROOT / package
    tree = tree_of((folder / "README.md").read_text(encoding="utf-8"))
    modules = {path.relative_to(folder).as_posix() for path in folder.rglob("*.py") if path.name != "__init__.py"}
    packages = {f"{path.parent.relative_to(folder).as_posix()}/" for path in folder.rglob("__init__.py")} - {"./"}
    assert {path for path in tree if path.endswith(".py")} == modules
    assert packages <= tree.keys()
    assert all((folder / path).exists() for path in tree)
    assert [path for path, text in tree.items() if not text] == []
