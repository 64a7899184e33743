"""What `doctor` says of the certificates that let sites through the door."""

import datetime as dt
import json
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from deploy.identity.site_certificates import ISSUED, create_door_authority, issue_site_certificate
from server.cli.membership.registry_sync import certificate_checks, certificates_left
from server.federation.fleet.registry import Registry
from tests.signing import public_of


def node_key() -> str:
    public = ec.generate_private_key(ec.SECP384R1()).public_key()
    return public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode("ascii")


def admit(home: Path, alias: str, *, days: int | None) -> None:
    """A site whose certificate ends in `days`; None: it has none, as in a folder of an earlier version."""
    key = node_key()
    Registry(home / "sites.json").add(alias, key, public_of(alias))
    if days is not None:
        issue_site_certificate(home / "pki", alias, key, days=730)
        issued = json.loads((home / "pki" / ISSUED).read_text())
        issued[-1]["until"] = (dt.datetime.now(dt.UTC) + dt.timedelta(days=days, hours=1)).isoformat()
        (home / "pki" / ISSUED).write_text(json.dumps(issued))


def said(home: Path) -> str:
    (finding,) = certificate_checks(home)
    return finding.text


def test_certificates_that_are_missing_have_ended_or_end_soon_are_told_apart(tmp_path: Path):
    create_door_authority(tmp_path / "pki")
    admit(tmp_path, "long", days=400)
    assert said(tmp_path) == "each lasts 30 days and more"
    for alias, days in {"soon": 9, "none": None, "over": -3, "gone": None}.items():
        admit(tmp_path, alias, days=days)
    assert said(tmp_path) == (
        "warning: not there: gone, none; ended: over; end within 30 days: soon: `maskfed-server sites certify`"
    )
    left = certificates_left(tmp_path)
    assert (left["none"], int(left["long"] or 0)) == (None, 400)
