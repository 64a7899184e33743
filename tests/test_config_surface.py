"""No dead options: every field of an experiment is read by the code, outside the file that declares it."""

import re
from pathlib import Path

from shared.experiment.config import Experiment

ROOT = Path(__file__).parent.parent
SOURCES = {
    path: path.read_text(encoding="utf-8")
    for package in ("server", "client", "shared")
    for path in (ROOT / package).rglob("*.py")
}
FIELDS = [
    (section, field)
    for section, description in Experiment.model_fields.items()
    for field in description.annotation.model_fields
]


def is_read(section: str, field: str) -> bool:
    """The field is accessed as `.section.field`, or through a variable named like the section or its first letters."""
    owner = rf"(?:\.{section}|\b{section}(?:_config)?|\bconfig|\bplan)"
    pattern = re.compile(rf"{owner}\.{field}\b")
    return any(f".{field}" in text and pattern.search(text) for text in SOURCES.values())


def test_every_field_is_read_by_the_code():
    """What is declared and read by nothing is built or removed."""
    assert [f"{section}.{field}" for section, field in FIELDS if not is_read(section, field)] == []


def test_a_field_that_nothing_reads_would_be_found():
    assert not is_read("optim", "no_such_field")
