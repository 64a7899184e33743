"""A site's identity files: made and renewed by `enroll`, completed by `join`.

The node key lets the site through the coordinator's door, the signing key says who answered. With two users they lie
apart: the node key with the half that talks to the coordinator, the signing key beside the ledger.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives import serialization

from deploy.errors import ProvisionError
from deploy.identity.certificates import LOCAL_TLS, create_local_tls
from deploy.identity.enrolment import JoinBundle, check_alias, write_request
from deploy.identity.keys import (
    create_file,
    create_node_key,
    create_secret,
    create_signing_key,
    load_certificate,
    public_key_digest,
    removed_if_unfinished,
)
from deploy.identity.site_certificates import SITE_CERTIFICATE, check_site_certificate, install_site_certificate

NODE_KEY, SIGNING_KEY = "node.key", "site-sign.key"
SECRET = "site.secret"
CA_CERTIFICATE = "ca.crt"
REQUEST_CERTIFICATE = "request.der"
"""Certificate of the newest request key that the site has seen."""
SPLIT_MARK = "node.user"
"""Written by `systemd/split-site`: name of the user who holds the node key instead."""
RENEWABLE = ("node", "signing")
CURE_SPLIT = "run this as root and say where, --node-key /var/lib/maskfed-node/node.key"


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
        raise ProvisionError(f"{node} is with another user: {CURE_SPLIT}")
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
    """Store the certificates of a bundle that was made for this site's keys: the coordinator's and its own.

    Raises:
        ProvisionError: the bundle is for another key, or the site trusts another coordinator already.
    """
    public, signing = home / f"{NODE_KEY}.pub", home / f"{SIGNING_KEY}.pub"
    if not (public.exists() and signing.exists()):
        raise ProvisionError(f"{home} lacks a key: run `maskfed-client enroll` there first and send the line")
    own = (public_key_digest(public.read_text(encoding="ascii")), signing.read_text(encoding="ascii").strip())
    if own != (bundle.public_key_digest, bundle.signing_key):
        raise ProvisionError(f"the bundle for {bundle.alias!r} belongs to another key: ask for one made for this site")
    check_site_certificate(bundle.site_certificate, public.read_text(encoding="ascii"))
    trusted = home / CA_CERTIFICATE
    if trusted.exists() and trusted.read_text(encoding="ascii") != bundle.ca_certificate:
        raise ProvisionError(f"{trusted} is of another coordinator: move it away first, or use another folder")
    if not trusted.exists():
        create_file(trusted, bundle.ca_certificate.encode())
    if not (home / REQUEST_CERTIFICATE).exists():
        certificate = load_certificate(bundle.request_certificate.encode())
        create_file(home / REQUEST_CERTIFICATE, certificate.public_bytes(serialization.Encoding.DER), 0o600)
    install_site_certificate(bundle.site_certificate, public.read_text(encoding="ascii"), home / SITE_CERTIFICATE)


def accept_certificate(home: Path, pem: str, node_key: Path | None = None) -> Path:
    """Store a renewed certificate for the door; where it lies now.

    Args:
        home: the site's folder.
        pem: what `maskfed-server sites certify` wrote.
        node_key: where the node key is; default: in `home`.

    Raises:
        ProvisionError: it is not for this site's node key, or the node key is with another user.
    """
    node = node_key or home / NODE_KEY
    if node_key is None and (home / SPLIT_MARK).exists():
        raise ProvisionError(f"{node} is with another user: {CURE_SPLIT}")
    public = _public(node)
    if not public.exists():
        raise ProvisionError(f"{public} is not there: run `maskfed-client enroll ALIAS` first")
    path = node.with_name(SITE_CERTIFICATE)
    install_site_certificate(pem, public.read_text(encoding="ascii"), path)
    if os.geteuid() == 0:
        owner = node.parent.stat()
        os.chown(path, owner.st_uid, owner.st_gid)
    return path


def _make_folder(home: Path) -> None:
    """Whatever is missing, or was left empty by a full disk; each is there whole or not at all."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        home.chmod(0o700)
    except OSError as error:
        raise ProvisionError(f"{home}: {error.strerror}; give a folder that this user can write") from error
    if (home / SECRET).exists() and not (home / SECRET).stat().st_size:
        (home / SECRET).unlink()
    if not (home / SECRET).exists():
        create_secret(home / SECRET)
    if not all((home / "tls" / name).exists() for name in LOCAL_TLS):
        shutil.rmtree(home / "tls", ignore_errors=True)
        with removed_if_unfinished(home / "tls.new") as folder:
            create_local_tls(folder)
            folder.rename(home / "tls")


def _replace(key: Path, create: Callable[[Path], str]) -> None:
    """Make a key in a folder of its own and put both halves in place; root hands them to the folder's owner.

    The private half comes last: where it is, the public one is.
    """
    owner = key.parent.stat()
    with removed_if_unfinished(key.with_name(f"{key.name}.new")) as folder:
        new = folder / key.name
        create(new)
        for path, target in ((_public(new), _public(key)), (new, key)):
            if os.geteuid() == 0:
                os.chown(path, owner.st_uid, owner.st_gid)
            path.replace(target)


def _public(key: Path) -> Path:
    return key.with_name(key.name + ".pub")
