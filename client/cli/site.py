"""Commands of every day: scan, start, metrics, status, doctor; and leave."""

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from client.cli.confirm_persons import PersonsOption, confirm_persons, keep_persons
from client.cli.policy import describe
from client.cli.records import figures, watch_for_alerts
from client.home import find_home
from deploy.observe.logs import tell
from shared.commandline import JsonOption, owned, tell_json
from shared.errors import InputError

HomeOption = Annotated[
    Path | None,
    typer.Option(
        "--home", envvar="MASKFED_CLIENT_HOME", callback=owned("site"), help="The site's folder; default: ./site."
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the site's program."""
    data = typer.Typer(no_args_is_help=True, help="Prepare your private images.")
    data.command("scan")(data_scan)
    app.add_typer(data, name="data")
    for command in (start, metrics, status, doctor, leave):
        app.command()(command)


def data_scan(
    home: HomeOption = None,
    new: Annotated[
        bool, typer.Option("--new", help="Begin another data set. Files that are in both keep what they have spent.")
    ] = False,
    new_key: Annotated[
        bool, typer.Option("--new-key", help="Make a new data.key if the old one is lost. All spending is kept.")
    ] = False,
    num_persons: PersonsOption = None,
    allow_unreadable: Annotated[
        bool, typer.Option("--allow-unreadable", help="Go on even if more than 1 percent of the files cannot be read.")
    ] = False,
    retry_unreadable: Annotated[
        bool, typer.Option("--retry-unreadable", help="Try the files again that could not be read before.")
    ] = False,
) -> None:
    """Decode your images, drop duplicates and set a share aside for audits. After an interruption run it again."""
    from rich.progress import Progress

    from client.answers.audit_power import too_few
    from client.data.dataset import open_dataset, scan
    from client.records.journal import Journal
    from client.records.site_log import site_log
    from client.settings import load_settings

    place = find_home(home)
    settings = load_settings(place)
    confirm_persons(place, settings, num_persons)
    bars = Progress(transient=True, disable=not sys.stdout.isatty())
    with site_log(place, "scan", "shared"), bars as progress:
        bar = progress.add_task("decoding", total=None)
        found = scan(
            place,
            settings,
            is_new=new,
            is_key_lost=new_key,
            allow_unreadable=allow_unreadable,
            retry_unreadable=retry_unreadable,
            on_progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    keep_persons(place, settings)
    Journal(place.journal).write("scan", dataset_id=found.dataset_id, image_size=found.size, linked=found.linked)
    for line in found.lines(settings.policy):
        print(line)
    policy, data = settings.policy, open_dataset(place, settings.image_size)
    if "audit" in policy.tasks and (problem := too_few(data, policy.unit, policy.audit)):
        print(f"PROBLEM: audits are refused: {problem}")


def start(
    home: HomeOption = None,
    port: Annotated[
        int | None, typer.Option(help="Local port for this site's own processes; default: a free one.")
    ] = None,
    health_port: Annotated[int | None, typer.Option(help="Local port of the gRPC health check.")] = None,
    metrics_port: Annotated[int, typer.Option(help="Serve figures to Prometheus on this local port; 0: do not.")] = 0,
    page_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Show a live page, read only, on this local port; 0: do not.")
    ] = 0,
) -> None:
    """Take part until Ctrl-C. Processes that exit are restarted."""
    from client.operator.doctor import check_code, check_folder, check_records, check_signing_key
    from client.operator.live import TICK_SECONDS, live_view
    from client.operator.status import SiteView, hold_site
    from client.policy.approval import read_approved
    from client.settings import load_settings
    from deploy.checks.connection import check_door
    from deploy.checks.dial import Way
    from deploy.guards.superexec import verify_program
    from deploy.pages.service import page_service, tell_address
    from deploy.processes.process import check_port_free, free_ports, handle_signals
    from deploy.processes.services import SitePlan, site_services
    from deploy.processes.supervision import Supervisor

    place = find_home(home)
    settings = load_settings(place)
    check_folder(place)
    check_records(place, settings)
    check_signing_key(place)
    try:
        check_code(place)
    except InputError as error:  # it can be approved while the site runs
        tell(f"until it is approved every request is refused: {error}")
    spare = free_ports(2)
    ports = (port or spare[0], health_port or spare[1])
    for each, name in zip(ports, ("SuperNode", "health check"), strict=True):
        check_port_free("127.0.0.1", each, name)
    with hold_site(place), contextlib.ExitStack() as stack:
        largest = settings.policy.ranges.parameters[1]
        services = site_services(SitePlan(place.path, settings.address, *ports, largest, settings.proxy))
        if page_port:
            services.append(stack.enter_context(page_service(place.path, page_port, "client.live.site_page")))
        verify_program("client.entry")
        check_door(Way(settings.address, settings.proxy), place.path / "ca.crt", place.path / "node.key")
        supervisor = Supervisor(services, health_address=f"127.0.0.1:{ports[1]}")
        handle_signals(supervisor.request_stop)
        rules = describe(settings.policy, read_approved(place).refused)
        tell(f"site {settings.alias} takes part in {settings.address}; Ctrl-C ends it. {rules}")
        lines = SiteView(place, tell)
        stack.enter_context(supervisor)
        stack.enter_context(watch_for_alerts(place, settings.alias))
        if page_port:
            tell_address(place.path, page_port)
        stack.enter_context(figures(place, settings, metrics_port))
        if sys.stdout.isatty():
            with live_view(place) as live:
                supervisor.watch(live.tick, TICK_SECONDS)
        else:
            supervisor.watch(lines.show_lines)
    tell("stopped; a round that was cut off stays charged")


def metrics(home: HomeOption = None, port: Annotated[int, typer.Option(help="Local port to serve on.")] = 9465) -> None:
    """Serve the site's figures to Prometheus until Ctrl-C. `start --metrics-port` does the same."""
    from threading import Event

    from client.operator.metrics import site_gauges
    from client.settings import load_settings
    from deploy.observe.prometheus import serve
    from deploy.processes.process import check_port_free, handle_signals

    place = find_home(home)
    settings = load_settings(place)
    check_port_free("127.0.0.1", port, "metrics")
    stop = Event()
    handle_signals(stop.set)
    with serve(port, lambda: site_gauges(place, settings)):
        tell(f"figures of site {settings.alias} at http://127.0.0.1:{port}/metrics")
        stop.wait()


def status(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Show whether the site runs, its data, what it has spent, and the newest events."""
    from client.operator.status import entry_facts, is_running, status_facts, summary
    from client.settings import load_settings

    place = find_home(home)
    settings = load_settings(place)
    if as_json:
        told = status_facts(place, settings)
        told["spent"] = None if told["spent"] is None else vars(told["spent"])
        told["newest"] = list(map(entry_facts, told["newest"]))
        tell_json({"alias": settings.alias, "address": settings.address, "is_running": is_running(place), **told})
        return
    print(f"site {settings.alias} at {settings.address}: {'running' if is_running(place) else 'not running'}")
    for line in summary(place, settings):
        print(line)


def doctor(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Check everything that a round needs, and say what to do. Exit code 1 if something is missing."""
    from client.operator.doctor import check_site
    from client.settings import load_settings
    from deploy.checks.dial import Way
    from deploy.doctor import site_checks

    place = find_home(home)
    checks = [(check.name, check.is_ok, check.text) for check in check_site(place)]
    with contextlib.suppress(InputError):  # what is wrong with the settings is the first finding
        settings = load_settings(place)
        checks += site_checks(place.path, Way(settings.address, settings.proxy))
    if as_json:
        tell_json([{"name": name, "is_ok": is_ok, "text": text} for name, is_ok, text in checks])
    for name, is_ok, text in checks if not as_json else []:
        print(f"{'ok  ' if is_ok else 'FAIL'} {name}: {text}")
    if not all(is_ok for _, is_ok, _ in checks):
        sys.exit(1)


def leave(
    home: HomeOption = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    wipe: Annotated[
        bool,
        typer.Option("--wipe", help="Also remove decoded images, audits, answers and logs; say what stays."),
    ] = False,
) -> None:
    """Leave the federation: refuse every request from now on and delete its keys. Ledger and journal stay."""
    import shutil

    from client.operator import wipe as wiping
    from client.operator.status import hold_site
    from client.records.journal import Journal
    from client.settings import load_settings, save_settings
    from deploy.identity.site_identity import NODE_KEY, SIGNING_KEY

    place = find_home(home)
    settings = load_settings(place)
    if not yes:
        also = " and its decoded images" if wipe else ""
        typer.confirm(f"site {settings.alias} leaves {settings.address} and deletes its keys{also}. Go on?", abort=True)
    with hold_site(place):
        closed = settings.policy.model_copy(update={"tasks": ()})
        save_settings(place, settings.model_copy(update={"policy": closed}))
        for key in (NODE_KEY, SIGNING_KEY):
            (place.path / key).unlink(missing_ok=True)
        for folder in (place.replies, place.kept, place.secure_sums):
            shutil.rmtree(folder, ignore_errors=True)
        Journal(place.journal).write("left", address=settings.address)
        removed = wiping.wipe(place) if wipe else []
    for line in [*removed, *(wiping.what_stays(place, settings.head_file, settings.data) if wipe else [])]:
        typer.echo(line)
    typer.echo(f"left {settings.address}; ask the coordinator for `maskfed-server sites remove {settings.alias}`")
