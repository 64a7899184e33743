"""Certificates that end within 30 days, as alerts and as figures."""

import datetime as dt
from collections.abc import Iterator, Mapping
from pathlib import Path

from deploy.errors import ProvisionError
from deploy.identity.keys import EXPIRY_WARNING_DAYS, days_left
from deploy.identity.request_key import REQUEST_KEY
from deploy.identity.site_certificates import SITE_CERTIFICATE
from deploy.identity.site_identity import CA_CERTIFICATE

Files = Mapping[str, str | Path]
COORDINATORS: Files = {
    "server certificate": "pki/server.pem",
    "request key": REQUEST_KEY,
    "CA certificate": "pki/ca.crt",
}
SITES: Files = {"site certificate": SITE_CERTIFICATE, "CA certificate": CA_CERTIFICATE}
"""Files of either home by what an operator calls them."""


def certificates_left(home: Path, files: Files) -> dict[str, float]:
    """Days that each certificate lasts, negative where it has ended; those that cannot be read are left out."""
    found = {}
    for name, file in files.items():
        try:
            found[name] = days_left(home / file)
        except ProvisionError:
            continue
    return found


def ending(left: dict[str, float]) -> Iterator[tuple[str, str, str]]:
    """An alert for each that ends within 30 days, and another one once it has ended."""
    for name, days in left.items():
        if days < 0:
            yield "certificate", f"certificate {name} has ended", f"{name}: it has ended; `doctor` says what to do"
        elif days < EXPIRY_WARNING_DAYS:
            # Renewed and near its end again it is another thing to tell.
            key = f"certificate {name} {_day(days)}"
            text = f"{name}: it ends within {EXPIRY_WARNING_DAYS} days; `doctor` says what to do"
            yield "certificate", key, text


def _day(days: float) -> str:
    return f"{dt.datetime.now(dt.UTC) + dt.timedelta(days=days):%Y-%m-%d}"


def certificate_gauges(left: dict[str, float]) -> Iterator[tuple[str, str, str, dict[str, str], float]]:
    """The same for Prometheus."""
    for name, days in left.items():
        text = "Days that a certificate lasts; negative when it has ended."
        yield "maskfed_certificate_days", "gauge", text, {"certificate": name}, days
