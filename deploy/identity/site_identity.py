"""A site's identity files: made by `enroll`, completed by `join`."""

from pathlib import Path

from deploy.identity.certificates import create_local_tls
from deploy.identity.enrolment import JoinBundle, check_alias, public_key_digest, write_request
from deploy.identity.keys import ProvisionError, create_file, create_node_key, create_secret

NODE_KEY = "node.key"
SECRET = "site.secret"
CA_CERTIFICATE = "ca.crt"
SPLIT_MARK = "node.user"
"""Written by `systemd/split-site`: name of the user who holds the node key instead."""


def create_identity(home: Path, alias: str) -> str:
    """Make node key, secret and loopback TLS in a site's folder; the one-line enrolment request.

    A second call on the same folder keeps every key and prints a fresh request.

    Raises:
        ProvisionError: bad alias, unwritable folder.
    """
    check_alias(alias)
    key = home / NODE_KEY
    if key.exists():
        return write_request(alias, key)
    home.mkdir(parents=True, exist_ok=True)
    home.chmod(0o700)
    create_node_key(key)
    create_secret(home / SECRET)
    create_local_tls(home / "tls")
    return write_request(alias, key)


def accept_bundle(home: Path, bundle: JoinBundle) -> None:
    """Store the coordinator's CA certificate of a bundle that was made for this site's key.

    Raises:
        ProvisionError: the bundle is for another key, or the site trusts another coordinator already.
    """
    public = home / f"{NODE_KEY}.pub"
    if not public.exists():
        raise ProvisionError(f"{home} has no node key: run `maskfed-client enroll` there first")
    if public_key_digest(public.read_text(encoding="ascii")) != bundle.public_key_digest:
        raise ProvisionError(f"the bundle for {bundle.alias!r} belongs to another key: ask for one made for this site")
    trusted = home / CA_CERTIFICATE
    if trusted.exists() and trusted.read_text(encoding="ascii") != bundle.ca_certificate:
        raise ProvisionError(f"{trusted} is of another coordinator: move it away first, or use another folder")
    if not trusted.exists():
        create_file(trusted, bundle.ca_certificate.encode())
