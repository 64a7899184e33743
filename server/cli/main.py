"""Train and release models of faces, and coordinate a federation of sites that keep their images."""

# Commands import heavy packages when they run, so that --help and refusals are quick.

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

import typer

from deploy.errors import ProvisionError
from deploy.observe.logs import set_up_logging, tell
from server.cli import alignment, distances, evaluation, models, rehearsal, release, rounds, studies
from server.cli.membership import sites
from server.cli.membership.registry_sync import certificate_checks, ending_certificates, gauges, register_sites
from shared.commandline import JsonOption, in_panels, new_program, owned, run_app, tell_error, tell_json
from shared.errors import InputError

app = new_program(__doc__)
app.add_typer(sites.sites, name="sites")
models.register(app)
evaluation.register(app)
distances.register(app)
alignment.register(app)
release.register(app)
rounds.register(app)
rehearsal.register(app)
studies.register(app)

Home = Annotated[
    Path,
    typer.Option(
        "--home", envvar="MASKFED_SERVER_HOME", callback=owned(), help="The coordinator's folder.", show_default=True
    ),
]
DEFAULT_HOME = Path("coordinator")


PANELS = {
    "Set up and run a coordinator": ("init", "start", "doctor", "renew", "sites", "alerts"),
    "Train on public images": ("train", "sample", "export", "import-checkpoint", "data", "experiments"),
    "Federated rounds": ("plan", "finetune", "status", "logs", "stop", "align", "simulate"),
    "Measure, audit, release": ("evaluate", "loss", "projection", "audit", "release", "verify", "check", "report"),
    "Try out, and repeat the paper": ("demo", "reproduce", "toy"),
}
"""Commands by who needs them."""


def main() -> None:
    """Run a command; what the user can cure is one line and exit code 2, any other failure exit code 1."""
    set_up_logging(quiet=("httpx", "flwr", "alembic"))
    try:
        status = run_app(app)
    except (InputError, ProvisionError) as error:
        tell_error(error)
        sys.exit(2)
    except _operation_errors() as error:
        tell_error(error)
        sys.exit(1)
    sys.exit(status)


@app.command()
def init(
    *,
    home: Home = DEFAULT_HOME,
    address: Annotated[
        str | None, typer.Option(help="host:port where sites reach you; default: this machine only.")
    ] = None,
    host: Annotated[
        list[str] | None,
        typer.Option(help="Another host name or address to put into the certificate; may be repeated."),
    ] = None,
    port: Annotated[int, typer.Option(help="Local port that Flower's SuperLink listens on.")] = 8443,
    health_port: Annotated[int, typer.Option(help="Local port of the gRPC health check.")] = 8190,
    edge: Annotated[
        bool | None,
        typer.Option(
            "--edge/--no-edge", help="Put nginx in front as the only way in; default: yes for public addresses."
        ),
    ] = None,
    database: Annotated[
        bool, typer.Option(help="Keep Flower's state on disk, so that runs survive a restart. Use it for deployments.")
    ] = False,
) -> None:
    """Make a coordinator's folder: CA, server certificate, secret, settings."""
    from deploy.coordinator import Coordinator, create_coordinator, is_loopback
    from deploy.identity.addresses import split_address

    address = address or f"127.0.0.1:{port}"
    public = not is_loopback(split_address(address)[0])
    settings = Coordinator(1, address, "127.0.0.1", port, health_port, public if edge is None else edge, database)
    digest = create_coordinator(home, settings, host or [])
    print(f"coordinator folder {home}: sites connect to {address}{' through nginx' if settings.edge else ''}")
    print(f"CA fingerprint, to read out to each site by phone:\n  {digest}")
    print(f"move {home / 'ca' / 'ca.key'} to a place that is not this machine; `renew` needs it once a year")


@app.command()
def renew(
    home: Home = DEFAULT_HOME,
    ca_key: Annotated[Path | None, typer.Option(help="File of the CA key; default: ca/ca.key in the folder.")] = None,
    host: Annotated[
        list[str] | None,
        typer.Option(help="Another host name or address to put into the certificate; may be repeated."),
    ] = None,
    days: Annotated[int, typer.Option(min=1, max=3650, help="How long the new certificate is valid.")] = 365,
) -> None:
    """Issue a new server certificate from the same CA. Restart `start` afterwards; sites need to do nothing."""
    from deploy.coordinator import renew_certificate

    names = renew_certificate(home, ca_key or home / "ca" / "ca.key", host or [], days)
    print(f"new server certificate for {', '.join(names)}, valid {days} days; restart `maskfed-server start`")


@app.command()
def start(
    home: Home = DEFAULT_HOME,
    metrics_port: Annotated[int, typer.Option(help="Serve figures to Prometheus on this local port; 0: do not.")] = 0,
    page_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Show a live page, read only, on this local port; 0: do not.")
    ] = 0,
) -> None:
    """Run the coordinator until Ctrl-C. Processes that exit are restarted, runs that died are submitted again."""
    from deploy.alerts.notifier import notifying
    from deploy.coordinator import read_coordinator, start_plan
    from deploy.pages.service import page_service, tell_address
    from deploy.processes.process import handle_signals, only_one
    from deploy.processes.supervision import Supervisor
    from server.federation.alerts import RunAlerts

    os.umask(0o077)
    settings = read_coordinator(home)
    with only_one(home / "start.lock"), contextlib.ExitStack() as stack:
        services = start_plan(home, settings, lambda: register_sites(home))
        if page_port:
            services.append(stack.enter_context(page_service(home, page_port, "server.live.coordinator_page")))
        supervisor = Supervisor(services, health_address=f"127.0.0.1:{settings.health_port}")
        handle_signals(supervisor.request_stop)
        told = notifying(home, "coordinator", [RunAlerts(home), lambda _since: ending_certificates(home)])
        with supervisor, _metrics(metrics_port, lambda: gauges(home)), told:
            tell(f"ready: sites connect to {settings.address}")
            if page_port:
                tell_address(home, page_port)
            supervisor.watch(lambda: _look_after(home, is_watched=bool(page_port)))


@app.command()
def doctor(home: Home = DEFAULT_HOME, as_json: JsonOption = False) -> None:
    """Check folder, keys, certificates, ports and processes, and say what to do. Exit code 1 if something is wrong."""
    from deploy.doctor import coordinator_checks

    findings = [*coordinator_checks(home), *certificate_checks(home)]
    if as_json:
        tell_json([finding._asdict() for finding in findings])
    for finding in findings if not as_json else []:
        print(f"{'ok  ' if finding.is_ok else 'FAIL'} {finding.name}: {finding.text}")
    if not all(finding.is_ok for finding in findings):
        sys.exit(1)


@app.command()
def demo(
    *,
    public: Annotated[
        Path | None, typer.Option(help="Folder or zip of public images; default: synthetic faces.")
    ] = None,
    faces: Annotated[Path | None, typer.Option(help="Folder or zip of private images, a folder per person.")] = None,
    sites: Annotated[int, typer.Option(min=2, max=16, help="How many sites to run on this machine.")] = 3,
    rounds: Annotated[int, typer.Option(min=1, help="How many fine-tuning rounds to run, with --non-private.")] = 4,
    budget: Annotated[str, typer.Option(help="How long everything may take, for example 90s, 8m or 1h.")] = "8m",
    out: Annotated[Path, typer.Option(help="New folder for everything the demo makes.")] = Path("demo"),
    port: Annotated[int, typer.Option(help="Use ports from this number on; 0: any free ones.")] = 0,
    non_private: Annotated[
        bool, typer.Option("--non-private", help="Rounds without differential privacy, also on photographs of yours.")
    ] = False,
) -> None:
    """Try everything on this machine: public training, a federation of sites, private stages, audit, release."""
    from server.simulation.demo.demo_options import DemoSettings
    from server.simulation.demo.run import run_demo
    from server.simulation.demo_budget import parse_budget

    settings = DemoSettings(public, faces, sites, rounds, out, port, not non_private)
    run_demo(settings, parse_budget(budget), lambda text: print(text, flush=True))


def _metrics(
    port: int, collect: Callable[[], Iterable[tuple[object, ...]]]
) -> contextlib.AbstractContextManager[object]:
    """The Prometheus endpoint, if one is wanted."""
    from deploy.observe.prometheus import serve
    from deploy.processes.process import check_port_free

    if not port:
        return contextlib.nullcontext()
    check_port_free("127.0.0.1", port, "metrics")
    return serve(port, collect)


def _look_after(home: Path, *, is_watched: bool) -> None:
    """Submit wanted runs again whose ServerApp died, and note who is online where somebody looks at it."""
    from server.federation.fleet.online import is_due, note_online
    from server.federation.fleet.superlink import connect
    from server.federation.fleet.superlink_types import ControlError
    from server.federation.resubmission import Wanted

    wanted = Wanted(home)
    try:
        is_noted = is_watched and is_due(home, time.time())
        has_running = wanted.has_running()
        if not (has_running or is_noted):
            return
        with connect(home) as control:
            if is_noted:
                note_online(home, control.nodes(), time.time())
            if has_running:
                wanted.tick(control)
    except (ControlError, InputError) as error:
        logging.getLogger("maskfed.server").warning("%s", error)


def _operation_errors() -> tuple[type[Exception], ...]:
    """Failures of running systems, told in one line, as far as their modules were loaded."""
    named = (
        ("server.federation.fleet.superlink_types", "ControlError"),
        ("deploy.processes.demo_commands", "CommandError"),
    )
    return tuple(getattr(sys.modules[module], name) for module, name in named if module in sys.modules)


in_panels(app, PANELS)

if __name__ == "__main__":
    main()
