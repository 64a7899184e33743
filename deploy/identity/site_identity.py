"""A site's identity files: made and renewed by `enroll`, completed by `join`.

The node key lets the site through the coordinator's door, the signing key says who answered. With two users they lie
apart: the node key with the half that talks to the coordinator, the signing key beside the ledger.
"""

import os
from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives import serialization

from deploy.identity.certificates import create_local_tls
from deploy.identity.enrolment import JoinBundle, check_alias, public_key_digest, write_request
from deploy.identity.keys import (
    ProvisionError,
    create_file,
    create_node_key,
    create_secret,
    create_signing_key,
    load_certificate,
)

NODE_KEY, SIGNING_KEY = "node.key", "site-sign.key"
SECRET = "site.secret"
CA_CERTIFICATE = "ca.crt"
REQUEST_CERTIFICATE = "request.der"
"""Certificate of the newest request key that the site has seen."""
SPLIT_MARK = "node.user"
"""Written by `systemd/split-site`: name of the user who holds the node key instead."""
RENEWABLE = ("node", "signing")


def create_identity(home: Path, alias: str, renew: str | None = None, node_key: Path | None = None) -> str:
    """Make the keys, secret and loopback TLS that a site's folder lacks; the one-line enrolment request.

    A folder of a version before signed messages gets its signing key; a second call keeps what is there and gives a
    fresh request.

    Args:
        home: the site's folder.
        alias: name of the site.
        renew: key to replace by a new one, one of `RENEWABLE`; the other one vouches for it.
        node_key: where the node key is; default: in `home`.

    Raises:
        ProvisionError: bad alias, unwritable folder, the node key is elsewhere, or there is no key to renew yet.
    """
    check_alias(alias)
    node, signing = node_key or home / NODE_KEY, home / SIGNING_KEY
    if node_key is None and (home / SPLIT_MARK).exists():
        raise ProvisionError(
            f"{node} is with another user: run this as root and say where, --node-key /var/lib/maskfed-node/node.key"
        )
    if node_key is not None and not home.is_dir():
        raise ProvisionError(f"{home} is no folder of a site: run enroll there without --node-key first")
    if renew and not (node.exists() and signing.exists()):
        raise ProvisionError(f"{home} has no two keys, so none can be renewed: run enroll without --renew")
    if node_key is None:
        _make_folder(home)
    if not node.exists() or renew == "node":
        _replace(node, create_node_key)
        # The copy that `join` compares with stays beside the rest.
        (home / f"{NODE_KEY}.pub").write_bytes(_public(node).read_bytes())
    if not signing.exists() or renew == "signing":
        _replace(signing, create_signing_key)
    return write_request(alias, node, signing)


def accept_bundle(home: Path, bundle: JoinBundle) -> None:
    """Store the coordinator's certificates of a bundle that was made for this site's keys.

    Raises:
        ProvisionError: the bundle is for another key, or the site trusts another coordinator already.
    """
    public, signing = home / f"{NODE_KEY}.pub", home / f"{SIGNING_KEY}.pub"
    if not (public.exists() and signing.exists()):
        raise ProvisionError(f"{home} lacks a key: run `maskfed-client enroll` there first and send the line")
    own = (public_key_digest(public.read_text(encoding="ascii")), signing.read_text(encoding="ascii").strip())
    if own != (bundle.public_key_digest, bundle.signing_key):
        raise ProvisionError(f"the bundle for {bundle.alias!r} belongs to another key: ask for one made for this site")
    trusted = home / CA_CERTIFICATE
    if trusted.exists() and trusted.read_text(encoding="ascii") != bundle.ca_certificate:
        raise ProvisionError(f"{trusted} is of another coordinator: move it away first, or use another folder")
    if not trusted.exists():
        create_file(trusted, bundle.ca_certificate.encode())
    if not (home / REQUEST_CERTIFICATE).exists():
        certificate = load_certificate(bundle.request_certificate.encode())
        create_file(home / REQUEST_CERTIFICATE, certificate.public_bytes(serialization.Encoding.DER), 0o600)


def _make_folder(home: Path) -> None:
    home.mkdir(parents=True, exist_ok=True)
    home.chmod(0o700)
    if not (home / SECRET).exists():
        create_secret(home / SECRET)
    if not (home / "tls").exists():
        create_local_tls(home / "tls")


def _replace(key: Path, create: Callable[[Path], str]) -> None:
    """Make a key under another name and put both halves in place; root hands them to the folder's owner."""
    new = key.with_name(f"{key.name}.{os.getpid()}.new")
    for left in (new, _public(new)):
        left.unlink(missing_ok=True)
    create(new)
    owner = key.parent.stat()
    for path, target in ((new, key), (_public(new), _public(key))):
        if os.geteuid() == 0:
            os.chown(path, owner.st_uid, owner.st_gid)
        path.replace(target)


def _public(key: Path) -> Path:
    return key.with_name(key.name + ".pub")
