"""`maskfed-server sites`: who may take part. Each change and each refusal leaves a line in `logs/admissions.log`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deploy.errors import ProvisionError
from server.cli.membership.registry_sync import (
    certificates_left,
    register_sites,
    write_bundles,
    write_certificates,
)
from shared.commandline import owned
from shared.errors import InputError

if TYPE_CHECKING:
    from server.federation.fleet.registry import Site

sites = typer.Typer(no_args_is_help=True, help="Add, renew, list and remove sites.")

DEFAULT_HOME = Path("coordinator")
Home = Annotated[
    Path,
    typer.Option(
        "--home", envvar="MASKFED_SERVER_HOME", callback=owned(), help="The coordinator's folder.", show_default=True
    ),
]


@sites.command("add")
def sites_add(
    requests: Annotated[list[str], typer.Argument(help="Enrolment lines from sites, or files with one line each.")],
    home: Home = DEFAULT_HOME,
    bundle: Annotated[
        Path | None, typer.Option(help="File to write the join bundle to; default: ALIAS.join.json.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Add sites by their enrolment lines, and write the join bundle to send back to each. A line works once."""
    from deploy.coordinator import read_coordinator
    from deploy.identity.enrolment import read_request
    from deploy.identity.keys import fingerprint
    from server.federation.fleet.admission import recorded
    from server.federation.fleet.registry import Registry

    settings, registry = read_coordinator(home), Registry(home / "sites.json")
    if bundle and len(requests) > 1:
        raise InputError(f"--bundle names one file, but there are {len(requests)} requests: leave it out")
    with recorded(home, "added") as aliases:
        enrolments = [read_request(_line(request)) for request in requests]
        registry.check_new([(each.alias, each.public_key, each.signing_key) for each in enrolments])
        targets = [bundle or Path(f"{enrolment.alias}.join.json") for enrolment in enrolments]
        if taken := next(filter(Path.exists, targets), None):
            raise ProvisionError(f"{taken} exists already: move it away first, or give --bundle")
        write_bundles(home, settings.address, dict(zip(targets, enrolments, strict=True)))
        for enrolment in enrolments:
            registry.add(enrolment.alias, enrolment.public_key, enrolment.signing_key)
            aliases.append(enrolment.alias)
    register_sites(home)
    digest = fingerprint(home / "pki" / "ca.crt")
    if as_json:
        added = [{"alias": alias, "bundle": str(target)} for alias, target in zip(aliases, targets, strict=True)]
        typer.echo(json.dumps({"added": added, "ca_fingerprint": digest}))
        return
    for alias, target in zip(aliases, targets, strict=True):
        typer.echo(f"site {alias} added; send it {target}")
    typer.echo(f"CA fingerprint, to compare by phone:\n  {digest}")


@sites.command("renew")
def sites_renew(
    request: Annotated[str, typer.Argument(help="Enrolment line of a registered site, or a file that holds it.")],
    home: Home = DEFAULT_HOME,
    bundle: Annotated[
        Path | None, typer.Option(help="Also write a join bundle, for a site that has not joined.")
    ] = None,
) -> None:
    """Accept a site's new node key or signing key, vouched for by the other one. The old key is refused for ever."""
    from deploy.coordinator import read_coordinator
    from deploy.identity.enrolment import read_request
    from server.federation.fleet.admission import recorded
    from server.federation.fleet.registry import Registry

    settings = read_coordinator(home)
    with recorded(home, "renewed") as aliases:
        enrolment = read_request(_line(request))
        if bundle and bundle.exists():
            raise ProvisionError(f"{bundle} exists already: move it away first, nothing is overwritten")
        registry = Registry(home / "sites.json")
        changed = registry.renew(enrolment.alias, enrolment.public_key, enrolment.signing_key)
        aliases.append(enrolment.alias)
    certificates: dict[str, Path] = {}
    if bundle:
        write_bundles(home, settings.address, {bundle: enrolment})
    elif changed == "node key":
        certificates = write_certificates(home, Path(), {enrolment.alias: enrolment.public_key})
    register_sites(home)
    typer.echo(f"site {enrolment.alias} has a new {changed}; signing key, to compare by phone:")
    typer.echo(f"  {enrolment.signing_key}")
    for target in certificates.values():
        typer.echo(f"send it {target}, for `maskfed-client certificate {target.name}`")


@sites.command("certify")
def sites_certify(
    aliases: Annotated[
        list[str] | None,
        typer.Argument(help="Sites; default: all without a certificate, or whose certificate ends soon."),
    ] = None,
    home: Home = DEFAULT_HOME,
    folder: Annotated[Path, typer.Option(help="Where to write ALIAS.certificate.pem.")] = Path(),
) -> None:
    """Write new certificates for sites; a folder set up by an earlier version also gets the CA that signs them."""
    from deploy.coordinator import read_settings
    from deploy.identity.site_certificates import RENEW_DAYS, create_door_authority
    from server.federation.fleet.admission import recorded
    from server.federation.fleet.registry import Registry

    read_settings(home)
    registry = Registry(home / "sites.json")
    named = [registry.get(alias) for alias in aliases or ()]
    is_new = create_door_authority(home / "pki")
    ending = {alias for alias, left in certificates_left(home).items() if left is None or left < RENEW_DAYS}
    chosen = named or [site for site in registry.admitted() if site.alias in ending]
    with recorded(home, "certified") as done:
        targets = write_certificates(home, folder, {site.alias: site.public_key for site in chosen})
        done += [site.alias for site in chosen]
    register_sites(home)
    if is_new:
        typer.echo("the door has a CA for its sites now: restart `maskfed-server start`")
    for alias, target in targets.items():
        typer.echo(f"send {target} to {alias}, who runs `maskfed-client certificate {target.name}`")
    if not targets:
        typer.echo(f"every site's certificate lasts {RENEW_DAYS} days and more: name a site to write another one")


@sites.command("list")
def sites_list(
    home: Home = DEFAULT_HOME, as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False
) -> None:
    """List all sites: alias, online or not, when added or removed."""
    from deploy.checks.answering import is_healthy
    from deploy.coordinator import read_coordinator
    from server.federation.fleet.registry import Registry
    from server.federation.fleet.superlink import connect

    settings = read_coordinator(home)
    status: dict[str, str] = {}
    if is_healthy(f"127.0.0.1:{settings.port}", home / "pki" / "ca.crt"):
        with connect(home) as control:
            status = {node.alias: node.status for node in control.nodes()}
    found = [
        {"alias": site.alias, "added": site.added, "removed": site.revoked,
         "status": _status(site, status)}
        for site in Registry(home / "sites.json").sites()
    ]  # fmt: skip
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    for site in found if not as_json else []:
        state = f"removed {site['removed']}" if site["removed"] else site["status"]
        typer.echo(f"{site['alias']:32} {state:32} added {site['added']}")


def _status(site: "Site", online: Mapping[str, str]) -> str:
    if site.revoked:
        return "removed"
    if not site.signing_key:
        return "no signing key: `sites renew` with a new line of `maskfed-client enroll`"
    return online.get(site.alias, "unknown (no SuperLink)")


@sites.command("remove")
def sites_remove(
    alias: Annotated[str, typer.Argument(help="Name of a site, as `sites list` shows it.")],
    home: Home = DEFAULT_HOME,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Remove a site. Its key is refused at once and for ever."""
    from deploy.coordinator import read_coordinator
    from server.federation.fleet.admission import recorded
    from server.federation.fleet.registry import Registry

    read_coordinator(home)
    with recorded(home, "removed") as aliases:
        Registry(home / "sites.json").revoke(alias)
        aliases.append(alias)
    is_told = register_sites(home)
    when = "its key is refused from now on" if is_told else "its key is refused once the SuperLink runs again"
    typer.echo(json.dumps({"alias": alias, "removed": True}) if as_json else f"site {alias} removed: {when}")


@sites.command("trust")
def sites_trust(
    alias: Annotated[str, typer.Argument(help="Name of a site that a run doubts, as `status RUN --json` shows it.")],
    run: Annotated[str, typer.Option(help="The run.")],
    home: Home = DEFAULT_HOME,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Count a site in full that a run doubts, from now on; this run does not doubt it again."""
    from deploy.coordinator import read_settings
    from server.federation.acceptance.trust import doubted_by, trust
    from server.federation.finetune import check_name
    from server.federation.fleet.admission import recorded

    read_settings(home)
    check_name(run)
    folder = home / "runs" / run
    with recorded(home, f"trusted in {run}") as aliases:
        if alias not in (known := doubted_by(folder)):
            raise InputError(f"run {run} does not doubt {alias!r}: it doubts {', '.join(known) or 'nobody'}")
        trust(folder, alias)
        aliases.append(alias)
    text = f"site {alias} counts in full in {run}"
    typer.echo(json.dumps({"alias": alias, "run": run, "trusted": True}) if as_json else text)


def _line(request: str) -> str:
    """An enrolment line, given itself or as a file."""
    is_file = len(request) < 256 and Path(request).is_file()
    return Path(request).read_text(encoding="utf-8", errors="replace") if is_file else request
