"""Commits of results: changed files show, the table that measuring writes does not."""

import subprocess
from pathlib import Path

import pytest

from shared.storage import versions


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A work tree of one commit."""
    for name in (versions.FIGURES, "shared/storage/versions.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("as committed\n")
    git = ("git", "-c", "user.name=tester", "-c", "user.email=tester@example.org")
    for words in (("init", "-q"), ("add", "."), ("commit", "-qm", "first")):
        subprocess.run([*git, *words], cwd=tmp_path, check=True)
    monkeypatch.setattr(versions, "__file__", str(tmp_path / "shared" / "storage" / "versions.py"))
    return tmp_path


@pytest.mark.parametrize(
    ("changed", "is_told"), [(None, False), (versions.FIGURES, False), ("shared/storage/versions.py", True)]
)
def test_only_what_may_change_a_figure_is_told(tree: Path, changed: str | None, is_told: bool):
    if changed is not None:
        (tree / changed).write_text("changed\n")
    commit = versions.git_commit.__wrapped__()
    assert commit is not None
    assert commit.endswith("+changes") == is_told
    assert len(commit.removesuffix("+changes")) == 40
