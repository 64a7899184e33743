"""`maskfed-client`: the site operator's commands. Each is thin and imports what it needs when it runs."""

import contextlib
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from client import cli_audit, cli_join, cli_ledger, cli_records, cli_statistics
from client.cli_join import describe
from client.settings import find_home, load_settings
from deploy.logs import set_up_logging, tell
from deploy.provision import ProvisionError
from shared.commandline import run_app
from shared.errors import InputError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, help=__doc__)
data = typer.Typer(no_args_is_help=True, help="The private images.")
app.add_typer(data, name="data")
cli_join.register(app)
cli_ledger.register(app)
cli_records.register(app)
cli_audit.register(app)
cli_statistics.register(app)

HomeOption = Annotated[Path | None, typer.Option("--home", help="The site's folder; default: MASKFED_CLIENT_HOME.")]


def main() -> None:
    """Run a command; what the user can cure is one line and exit code 2, any other failure exit code 1."""
    os.umask(0o077)
    set_up_logging(quiet=("httpx", "flwr", "shared.decoding"))
    try:
        status = run_app(app)
    except (InputError, ProvisionError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    sys.exit(status)


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
    bars = Progress(transient=True, disable=not sys.stdout.isatty())
    with site_log(place, "scan", "shared"), bars as progress:
        bar = progress.add_task("decoding", total=None)
        found = scan(
            place,
            settings,
            is_new=new,
            on_progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    Journal(place.journal).write("scan", dataset_id=found.dataset_id, image_size=found.size, linked=found.linked)
    for line in found.lines(settings.policy):
        print(line)


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
    from client.doctor import check_code, check_folder, check_records
    from client.gauges import site_gauges
    from client.live import TICK_SECONDS, live_view
    from client.view import SiteView, hold_site
    from deploy.exposition import serve
    from deploy.processes import check_port_free, free_ports, handle_signals
    from deploy.supervision import Supervisor
    from deploy.topology import SitePlan, site_services
    from deploy.way import check_door

    place = find_home(home)
    settings = load_settings(place)
    check_folder(place)
    check_records(place, settings)
    try:
        check_code(place)
    except InputError as error:  # it can be approved while the site runs
        tell(f"until it is approved every request is refused: {error}")
    spare = free_ports(2)
    ports = (port or spare[0], health_port or spare[1])
    for each, name in zip(ports, ("SuperNode", "health check"), strict=True):
        check_port_free("127.0.0.1", each, name)
    with hold_site(place), contextlib.ExitStack() as stack:
        services = site_services(SitePlan(place.path, settings.address, *ports, entry_module="client.entry"))
        check_door(settings.address, place.path / "ca.crt")
        supervisor = Supervisor(services)
        handle_signals(supervisor.request_stop)
        tell(f"site {settings.alias} takes part in {settings.address}; Ctrl-C ends it. {describe(settings.policy)}")
        lines = SiteView(place, tell)
        stack.enter_context(supervisor)
        if metrics_port:
            check_port_free("127.0.0.1", metrics_port, "metrics")
            stack.enter_context(serve(metrics_port, lambda: site_gauges(place, settings)))
        if sys.stdout.isatty():
            with live_view(place) as live:
                supervisor.watch(live.tick, TICK_SECONDS)
        else:
            supervisor.watch(lines.show_lines)
    tell("stopped; a round that was cut off stays charged")


@app.command()
def metrics(
    home: HomeOption = None, port: Annotated[int, typer.Option(help="Loopback port for Prometheus.")] = 9465
) -> None:
    """Serve the site's figures to Prometheus until Ctrl-C, for systemd's units; `start --metrics-port` does it too."""
    from threading import Event

    from client.gauges import site_gauges
    from deploy.exposition import serve
    from deploy.processes import check_port_free, handle_signals

    place = find_home(home)
    settings = load_settings(place)
    check_port_free("127.0.0.1", port, "metrics")
    stop = Event()
    handle_signals(stop.set)
    with serve(port, lambda: site_gauges(place, settings)):
        tell(f"figures of site {settings.alias} at http://127.0.0.1:{port}/metrics")
        stop.wait()


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
def doctor(home: HomeOption = None) -> None:
    """Check everything a round needs and say what to do; exit code 1 when something is missing."""
    from client.doctor import check_site
    from deploy.doctor import site_checks

    place = find_home(home)
    checks = [(check.name, check.is_ok, check.text) for check in check_site(place)]
    with contextlib.suppress(InputError):  # what is wrong with the settings is the first finding
        checks += site_checks(place.path, load_settings(place).address)
    for name, is_ok, text in checks:
        print(f"{'ok  ' if is_ok else 'FAIL'} {name}: {text}")
    if not all(is_ok for _, is_ok, _ in checks):
        sys.exit(1)


if __name__ == "__main__":
    main()
