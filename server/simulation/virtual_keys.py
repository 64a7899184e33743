"""Keys of a simulation: its own CA, the request key, and each virtual site's signing key and entry in the registry."""

import shutil
from pathlib import Path

from deploy.identity.certificates import CA_DAYS, create_authority
from deploy.identity.keys import create_signing_key
from deploy.identity.request_key import REQUEST_KEY, issue_request_key
from deploy.identity.site_identity import CA_CERTIFICATE, SIGNING_KEY
from server.federation.fleet.registry import Registry


def make_keys(out: Path, num_sites: int) -> None:
    """Make what the simulation's folder `out` lacks; virtual sites sign and check like real ones.

    The CA key is thrown away at once: nothing is ever renewed.
    """
    if not (out / REQUEST_KEY).exists():
        shutil.rmtree(out / "pki", ignore_errors=True)
        certificate, key = out / "pki" / "ca.crt", out / "pki" / "ca.key"
        create_authority(key, certificate)
        issue_request_key(ca_key=key, ca_certificate=certificate, path=out / REQUEST_KEY, days=CA_DAYS)
        key.unlink()
    known = {site.alias: site for site in Registry(out / "sites.json").sites()}
    for index in range(num_sites):
        alias = f"site-{index}"
        signing_key = _site_key(out / "sites" / alias, out / "pki" / "ca.crt")
        registry, node_key = Registry(out / "sites.json"), f"virtual {alias}"
        if alias in known and not known[alias].signing_key:
            registry.renew(alias, node_key, signing_key)
        else:
            registry.add(alias, node_key, signing_key)


def _site_key(home: Path, authority: Path) -> str:
    """The public half of a virtual site's key (hexadecimal)."""
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    shutil.copyfile(authority, home / CA_CERTIFICATE)
    public = home / f"{SIGNING_KEY}.pub"
    if not public.exists():
        (home / SIGNING_KEY).unlink(missing_ok=True)
        create_signing_key(home / SIGNING_KEY)
    return public.read_text(encoding="ascii").strip()
