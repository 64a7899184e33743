"""What tests of stored results share."""

import shutil
from pathlib import Path

import pytest

from server.studies import stored_results
from server.studies.page import results_page


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder of results, but for what the paper reports."""
    place = tmp_path / "server" / "results"
    place.mkdir(parents=True)
    shutil.copy(stored_results.FOLDER / results_page.REPORTED_FILE, place)
    return place
