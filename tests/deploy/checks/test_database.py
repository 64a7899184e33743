import random
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from deploy.checks.database import check_database
from deploy.errors import ProvisionError


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """A database of several pages, written ahead as Flower's is."""
    path = tmp_path / "superlink.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("CREATE TABLE run (id INTEGER PRIMARY KEY, text TEXT)")
        connection.executemany("INSERT INTO run (text) VALUES (?)", [("x" * 500,)] * 200)
        connection.commit()
    return path


def test_a_whole_database_and_none_are_taken(database: Path, tmp_path: Path):
    check_database(database)
    check_database(tmp_path / "none.db")


@pytest.mark.parametrize("is_whole", [True, False])
def test_a_damaged_database_is_told_with_what_may_be_done(database: Path, is_whole: bool):
    """Random bytes altogether, or in the middle of it."""
    data = bytearray(database.read_bytes())
    noise = random.Random(0).randbytes(20_000)
    if is_whole:
        data[:] = noise
    else:
        data[8192 : 8192 + len(noise)] = noise
    database.write_bytes(data)
    with pytest.raises(ProvisionError, match=r"superlink.db is damaged .*move it away.*sites.json"):
        check_database(database)


def test_a_database_in_use_is_not_called_damaged(database: Path):
    with closing(sqlite3.connect(database)) as other:
        other.execute("BEGIN EXCLUSIVE")
        check_database(database)
