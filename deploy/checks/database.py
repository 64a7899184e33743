"""Whether Flower's state on disk can be read, before the SuperLink fails on it in words of SQLAlchemy."""

import sqlite3
from contextlib import closing
from pathlib import Path

from deploy.errors import ProvisionError


def check_database(path: Path) -> None:
    """Refuse to start on a damaged `superlink.db`.

    Raises:
        ProvisionError: it is no database, or its pages contradict each other; with what to do, and what that costs.
    """
    if not path.exists():
        return
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
            found = str(database.execute("PRAGMA quick_check(1)").fetchone()[0])
    except sqlite3.OperationalError:  # in use, or of another owner: whoever opens it next says so
        return
    except sqlite3.DatabaseError as error:
        found = str(error)
    if found != "ok":
        raise ProvisionError(
            f"{path} is damaged ({found.splitlines()[-1][:200]}): move it away with its -wal and -shm. Nothing else is "
            "lost: keys are registered again from sites.json, and wanted runs go on from their newest checkpoints"
        )
