"""`maskfed-client`: the site operator's commands. Each is thin and imports what it needs when it runs."""

import contextlib
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from client import cli_audit, cli_records, cli_statistics
from client.settings import Home, SiteConfig, SitePolicy, find_home, load_settings, save_settings
from deploy.logs import set_up_logging
from deploy.provision import ProvisionError
from shared.errors import InputError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, help=__doc__)
data = typer.Typer(no_args_is_help=True, help="The private images.")
app.add_typer(data, name="data")
cli_records.register(app)
cli_audit.register(app)
cli_statistics.register(app)

HomeOption = Annotated[Path | None, typer.Option("--home", help="The site's folder; default: MASKFED_CLIENT_HOME.")]


def main() -> None:
    """Run a command; what the user can cure is one line and exit code 2, any other failure exit code 1."""
    os.umask(0o077)
    set_up_logging(quiet=("httpx", "flwr", "shared.decoding"))
    try:
        app()
    except (InputError, ProvisionError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


@app.command()
def enroll(alias: Annotated[str, typer.Argument(help="Name of the site.")], home: HomeOption = None) -> None:
    """Make the site's keys and print the one line that the coordinator needs."""
    from deploy.site import create_identity

    print(create_identity(find_home(home).path, alias))


@app.command()
def join(  # every rule of the policy is one option
    bundle: Annotated[Path, typer.Argument(help="The join bundle from the coordinator.")],
    data: Annotated[Path, typer.Option(help="Folder or zip of images; class folders are persons.")],
    image_size: Annotated[int, typer.Option(min=8, help="Side of the images in pixels.")],
    home: HomeOption = None,
    identities: Annotated[Path | None, typer.Option(help="File with `<file name> <person>` lines.")] = None,
    epsilon_cap: Annotated[float, typer.Option(min=0, help="Largest total epsilon of the data set.")] = 8.0,
    delta: Annotated[float, typer.Option(help="Delta of every epsilon.")] = 1e-5,
    unit: Annotated[str, typer.Option(help="What epsilon protects: image or person.")] = "image",
    min_noise: Annotated[float, typer.Option(help="Smallest noise multiplier.")] = 0.5,
    max_steps: Annotated[int, typer.Option(help="Most optimizer steps per round.")] = 2000,
    max_rounds: Annotated[int, typer.Option(help="Most rounds in 24 hours.")] = 100,
    allow_non_private: Annotated[
        bool, typer.Option("--allow-non-private", help="Accept training without DP: updates can then be inverted.")
    ] = False,
    allow_any_experiment: Annotated[
        bool, typer.Option("--allow-any-experiment", help="Do not ask for approval of each experiment.")
    ] = False,
    task: Annotated[list[str] | None, typer.Option(help="Allowed tasks; default: train.")] = None,
    release: Annotated[list[str] | None, typer.Option(help="Released scalars: loss, grad_norm, seconds.")] = None,
    image_count: Annotated[str, typer.Option(help="hidden, rounded or exact.")] = "hidden",
    min_images: Annotated[int, typer.Option(help="Fewest training images.")] = 1,
    held_out: Annotated[float, typer.Option(help="Share never trained on, for audits.")] = 0.1,
    head_file: Annotated[Path | None, typer.Option(help="Where the ledger's head is kept, outside --home.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads of a round; 0: torch's choice.")] = 0,
    start_now: Annotated[bool, typer.Option("--start", help="Go on with `data scan` and `start`.")] = False,
) -> None:
    """Accept a join bundle: trust its CA, approve its client code, write `site.toml` with the policy given here."""
    from client.settings import parse_settings
    from deploy.enrolment import read_bundle
    from deploy.site import accept_bundle

    place = find_home(home)
    joined = read_bundle(bundle)
    if place.settings.exists():
        raise InputError(f"{place.settings} exists already: edit it, or remove it first to join again")
    settings = parse_settings(
        {
            "alias": joined.alias,
            "address": joined.address,
            "data": str(data.resolve()),
            "identities": str(identities.resolve()) if identities else "",
            "image_size": image_size,
            "held_out_ratio": held_out,
            "head_file": str((head_file or default_head_file(place, joined.alias)).resolve()),
            "device": device,
            "threads": threads,
            "policy": {
                "tasks": task or ["train"],
                "experiments": "any" if allow_any_experiment else "approved",
                "require_dp": not allow_non_private,
                "unit": unit,
                "epsilon_cap": epsilon_cap,
                "delta": delta,
                "min_noise_multiplier": min_noise,
                "max_steps_per_round": max_steps,
                "max_rounds_per_day": max_rounds,
                "min_images_train": min_images,
                "image_count": image_count,
                "release_scalars": release or [],
            },
        },
        "join",
    )
    check_images(settings)
    cli_records.approve_installed(place, joined.code_digest)
    accept_bundle(place.path, joined)
    save_settings(place, settings)
    print(f"joined {joined.address} as {joined.alias}; CA fingerprint, to compare with the coordinator by phone:")
    print(f"  {joined.ca_fingerprint}")
    print(describe(settings.policy))
    print(f"policy: {place.settings}; next: `maskfed-client data scan`, `doctor`, `start`", flush=True)
    if start_now:
        data_scan(place.path)
        start(place.path)


def default_head_file(home: Home, alias: str) -> Path:
    """A file of this home below the user's state folder."""
    import hashlib

    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return state / "maskfed" / f"{alias}-{hashlib.sha256(str(home.path).encode()).hexdigest()[:12]}.json"


def check_images(settings: SiteConfig) -> None:
    """Refuse a folder without images before anything is written."""
    from shared.images import list_images

    list_images(Path(settings.data))


def describe(policy: SitePolicy) -> str:
    """The policy in one sentence per rule."""
    private = (
        f"training with DP only, at most epsilon {policy.epsilon_cap:g} at delta {policy.delta:g} per {policy.unit}"
        if policy.require_dp
        else "TRAINING WITHOUT DP IS ALLOWED: images can be reconstructed from such updates, and the ledger then says "
        f"`unbounded`; DP rounds up to epsilon {policy.epsilon_cap:g} at delta {policy.delta:g} per {policy.unit}"
    )
    asks = "each experiment needs your approval" if policy.experiments == "approved" else "any experiment within this"
    return (
        f"tasks {', '.join(policy.tasks) or 'none'}; {private}; noise multiplier from {policy.min_noise_multiplier:g}; "
        f"at most {policy.max_steps_per_round} steps per round and {policy.max_rounds_per_day} rounds per day; {asks}"
    )


@data.command("scan")
def data_scan(
    home: HomeOption = None,
    new: Annotated[
        bool, typer.Option("--new", help="Begin another data set; shared files keep their spending.")
    ] = False,
) -> None:
    """Decode the images into the private cache, drop duplicates, set the held-out share aside; interrupt at will."""
    from rich.progress import Progress

    from client.app import site_log
    from client.dataset import scan
    from client.journal import Journal

    place = find_home(home)
    settings = load_settings(place)
    with site_log(place, "scan", "shared"), Progress(transient=True) as progress:
        bar = progress.add_task("decoding", total=None)
        found = scan(
            place,
            settings,
            is_new=new,
            on_progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    Journal(place.journal).write("scan", dataset_id=found.dataset_id, image_size=found.size, linked=found.linked)
    print(f"data set {found.dataset_id}: {found.num_train} images to train on at {found.size} x {found.size} pixels")
    persons = "" if found.num_persons is None else f" ({found.num_held_out_persons} of {found.num_persons} persons)"
    print(f"held out for audits, never trained on: {found.num_held_out}{persons}")
    print(f"dropped: {found.num_duplicates} duplicates, {found.num_unreadable} unreadable (named in logs/scan.log)")
    if found.linked:
        print(f"shares files with {', '.join(found.linked)}: spending counts for all of them")


@app.command()
def start(
    home: HomeOption = None,
    port: Annotated[
        int | None, typer.Option(help="Loopback port for this site's own processes; default: free.")
    ] = None,
    health_port: Annotated[int | None, typer.Option(help="Loopback port of the gRPC health check.")] = None,
    metrics_port: Annotated[int, typer.Option(help="Loopback port for Prometheus; 0: none.")] = 0,
) -> None:
    """Take part, in the foreground, until Ctrl-C or SIGTERM; processes that exit are started again."""
    from client.gauges import site_gauges
    from client.view import SiteView, hold_site
    from deploy.exposition import serve
    from deploy.processes import check_port_free, free_ports, handle_signals
    from deploy.supervision import Supervisor
    from deploy.topology import SitePlan, site_services

    place = find_home(home)
    settings = load_settings(place)
    spare = free_ports(2)
    ports = (port or spare[0], health_port or spare[1])
    for each, name in zip(ports, ("SuperNode", "health check"), strict=True):
        check_port_free("127.0.0.1", each, name)
    with hold_site(place):
        supervisor = Supervisor(
            site_services(SitePlan(place.path, settings.address, *ports, entry_module="client.entry"))
        )
        handle_signals(supervisor.request_stop)
        view = SiteView(place, print)
        print(f"site {settings.alias} takes part in {settings.address}; Ctrl-C ends it. {describe(settings.policy)}")
        with contextlib.ExitStack() as stack:
            stack.enter_context(supervisor)
            if metrics_port:
                check_port_free("127.0.0.1", metrics_port, "metrics")
                stack.enter_context(serve(metrics_port, lambda: site_gauges(place, settings)))
            supervisor.watch(view.show_new)
        print("stopped; a round that was cut off stays charged")


@app.command()
def status(home: HomeOption = None) -> None:
    """Show what is going on: running or not, data, spending, the newest events."""
    from client.view import is_running, summary

    place = find_home(home)
    settings = load_settings(place)
    print(f"site {settings.alias} at {settings.address}: {'running' if is_running(place) else 'not running'}")
    for line in summary(place, settings):
        print(line)


@app.command()
def leave(
    home: HomeOption = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """End taking part: every request is refused from now on, the node key is deleted; ledger and journal stay."""
    import shutil

    from client.journal import Journal
    from client.view import hold_site
    from deploy.site import NODE_KEY

    place = find_home(home)
    settings = load_settings(place)
    if not yes:
        typer.confirm(f"site {settings.alias} leaves {settings.address} and deletes its node key. Go on?", abort=True)
    with hold_site(place):
        closed = settings.policy.model_copy(update={"tasks": ()})
        save_settings(place, settings.model_copy(update={"policy": closed}))
        (place.path / NODE_KEY).unlink(missing_ok=True)
        shutil.rmtree(place.replies, ignore_errors=True)
        Journal(place.journal).write("left", address=settings.address)
    print(f"left {settings.address}; ask the coordinator for `maskfed-server sites remove {settings.alias}`")


@app.command()
def doctor(home: HomeOption = None) -> None:
    """Check everything a round needs and say what to do; exit code 1 when something is missing."""
    from client.doctor import Check, check_site
    from deploy.enrolment import split_address
    from deploy.provision import check_private, days_left
    from deploy.topology import is_listening

    place = find_home(home)
    checks = check_site(place)
    try:
        address = load_settings(place).address
        check_private(place.path / "node.key")
        check_private(place.path / "site.secret")
        days = days_left(place.path / "ca.crt")
        checks.append(Check("certificate", days > 0, f"the coordinator's CA is valid for {days:.0f} more days"))
        split_address(address)
        there = is_listening(address, place.path / "ca.crt")
        text = f"{address} answers" if there else f"{address} does not answer: check the network and its `start`"
        checks.append(Check("coordinator", there, text))
    except (InputError, ProvisionError) as error:
        checks.append(Check("identity", False, str(error)))
    for check in checks:
        print(f"{'ok  ' if check.is_ok else 'FAIL'} {check.name}: {check.text}")
    if not all(check.is_ok for check in checks):
        sys.exit(1)


if __name__ == "__main__":
    main()
