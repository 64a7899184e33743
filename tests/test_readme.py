import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
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
        path = ROOT / file if "/" in file else ROOT / "tests" / "shared" / file
        assert re.search(rf"^def {function}\(", path.read_text(), re.MULTILINE), name
