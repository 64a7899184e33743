"""A disk that fills up, or a kill, in the middle of `enroll`: the next call makes a whole identity of what is there."""

import errno
import os
from pathlib import Path

import pytest

from deploy.errors import ProvisionError
from deploy.identity.enrolment import read_request
from deploy.identity.site_identity import create_identity

WHOLE = {"node.key", "node.key.pub", "site-sign.key", "site-sign.key.pub", "site.secret", "tls"}


class Killed(BaseException):
    """Nothing of ours catches it, as nothing catches SIGKILL; what runs after it is not counted on by any test."""


def number_of_writes(home: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int, error: BaseException) -> int:
    """Enroll while the `stop_at`-th file cannot be written; how many were tried."""
    tried = 0
    sync = os.fsync

    def limited(descriptor: int) -> None:
        nonlocal tried
        tried += 1
        if tried == stop_at:
            raise error
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", limited)
        create_identity(home, "site-0")
    return tried


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), Killed()])
def test_wherever_enroll_is_stopped_the_next_one_completes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
):
    number = number_of_writes(tmp_path / "undisturbed", monkeypatch, 0, error)
    assert number == 8
    for stop_at in range(1, number + 1):
        home = tmp_path / f"stopped-{stop_at}"
        with pytest.raises((ProvisionError, Killed)):
            number_of_writes(home, monkeypatch, stop_at, error)
        request = read_request(create_identity(home, "site-0"))
        assert {path.name for path in home.iterdir()} >= WHOLE
        assert not [path for path in home.rglob("*") if path.is_file() and not path.stat().st_size]
        assert request.public_key == (home / "node.key.pub").read_text().strip()
        assert {path.name for path in (home / "tls").iterdir()} == {"ca.crt", "srv.key", "srv.pem"}


def test_an_empty_secret_that_an_earlier_version_left_is_made_again(tmp_path: Path):
    create_identity(tmp_path / "site", "site-0")
    (tmp_path / "site" / "site.secret").write_bytes(b"")
    create_identity(tmp_path / "site", "site-0")
    assert (tmp_path / "site" / "site.secret").stat().st_size == 32
