"""What the door and the SuperLink know of the sites, kept in step with the registry; what sites are sent for it."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.errors import ProvisionError
from shared.errors import InputError

if TYPE_CHECKING:
    from deploy.checks.connection import Finding
    from deploy.identity.enrolment import EnrolmentRequest


def register_sites(home: Path) -> bool:
    """Make the door's revocations and a running SuperLink those of the registry; false without one, `start` does it.

    Raises:
        ProvisionError: it runs, but does not take them.
    """
    from deploy.checks.answering import is_healthy
    from deploy.coordinator import read_coordinator
    from server.federation.fleet.admission import synchronise
    from server.federation.fleet.registry import Registry
    from server.federation.fleet.superlink import connect
    from server.federation.fleet.superlink_types import ControlError

    settings = read_coordinator(home)
    revoke_certificates(home)
    if not is_healthy(f"127.0.0.1:{settings.port}", home / "pki" / "ca.crt"):
        return False
    try:
        with connect(home) as control:
            synchronise(control, Registry(home / "sites.json"))
    except ControlError as error:
        raise ProvisionError(f"{error}; the registry is changed, restart `maskfed-server start` to apply it") from error
    return True


def revoke_certificates(home: Path) -> None:
    """Make the door's revocations those of the registry; a running door reads them at once."""
    from deploy.identity.site_certificates import write_revocations
    from deploy.processes.nginx import reload_door
    from server.federation.fleet.registry import Registry

    if write_revocations(home / "pki", [site.public_key for site in Registry(home / "sites.json").admitted()]):
        reload_door(home)


def certificates_left(home: Path) -> dict[str, float | None]:
    """Days that the certificate of each admitted site lasts, by alias; below 0: it has ended, None: there is none."""
    from deploy.identity.keys import public_key_digest
    from deploy.identity.site_certificates import days_left_by_key
    from server.federation.fleet.registry import Registry

    left = days_left_by_key(home / "pki")
    sites = Registry(home / "sites.json").admitted()
    return {site.alias: left.get(public_key_digest(site.public_key)) for site in sites}


def certificate_checks(home: Path) -> "Iterator[Finding]":
    """Sites without a certificate for the door, or with one that has ended or ends soon; nothing in a broken folder."""
    from deploy.checks.connection import Finding
    from deploy.identity.keys import EXPIRY_WARNING_DAYS

    with contextlib.suppress(InputError, ProvisionError):
        left = sorted(certificates_left(home).items())
        kinds = {
            "not there": [alias for alias, days in left if days is None],
            "ended": [alias for alias, days in left if days is not None and days < 0],
            f"end within {EXPIRY_WARNING_DAYS} days": [
                alias for alias, days in left if days is not None and 0 <= days < EXPIRY_WARNING_DAYS
            ],
        }
        found = "; ".join(f"{kind}: {', '.join(aliases)}" for kind, aliases in kinds.items() if aliases)
        text = (
            f"warning: {found}: `maskfed-server sites certify`"
            if found
            else f"each lasts {EXPIRY_WARNING_DAYS} days and more"
        )
        yield Finding("site certificates", True, text)


def ending_certificates(home: Path) -> "Iterator[tuple[str, str, str]]":
    """Alerts for the coordinator's own certificates and those of its sites."""
    from deploy.alerts.expiry import ending

    yield from ending(_all_left(home))


def gauges(home: Path) -> "Iterator[tuple[str, str, str, dict[str, str], float]]":
    """Everything that Prometheus is shown."""
    from deploy.alerts.expiry import certificate_gauges
    from server.federation.fleet.metrics import coordinator_gauges

    yield from coordinator_gauges(home)
    yield from certificate_gauges(_all_left(home))


def _all_left(home: Path) -> dict[str, float]:
    from deploy.alerts.expiry import COORDINATORS
    from deploy.alerts.expiry import certificates_left as own_left

    own = own_left(home, COORDINATORS)
    return own | {
        f"certificate of {alias}": days for alias, days in certificates_left(home).items() if days is not None
    }


def write_bundles(home: Path, address: str, requests: "Mapping[Path, EnrolmentRequest]") -> None:
    """All bundles or none: this comes before the registry, so that no site is in that nobody could enrol again."""
    from deploy.identity.enrolment import write_bundle
    from shared.storage.code_digest import installed_digest

    written: list[Path] = []
    try:
        for target, request in requests.items():
            write_bundle(target, request, address, home / "pki", installed_digest())
            written.append(target)
    except ProvisionError:
        for target in written:
            target.unlink()
        raise


def write_certificates(home: Path, folder: Path, keys: Mapping[str, str]) -> dict[str, Path]:
    """Certificates over node keys, by alias, as files ALIAS.certificate.pem for sending; older ones are replaced."""
    from deploy.identity.keys import replace_file
    from deploy.identity.site_certificates import issue_site_certificate

    targets = {alias: folder / f"{alias}.certificate.pem" for alias in keys}
    for alias, target in targets.items():
        replace_file(target, issue_site_certificate(home / "pki", alias, keys[alias]).encode("ascii"))
    return targets
