"""`maskfed-server demo`: everything is checked, then one of the two demos runs."""

from collections.abc import Callable
from pathlib import Path

from deploy.processes.process import check_port_free, free_ports
from server.simulation.demo.demo_options import DemoSettings, own_folder
from server.simulation.demo.plain import Demo
from server.simulation.demo.private import PrivateDemo
from server.simulation.demo_budget import Budget
from shared.data.images import list_images
from shared.errors import InputError


def run_demo(settings: DemoSettings, budget: Budget, say: Callable[[str], None]) -> Path:
    """Show everything within the budget; the report.

    Raises:
        InputError: bad input, before anything is started.
        CommandError: a step failed; all processes are down again then.
    """
    if (settings.public is None) != (settings.faces is None):
        raise InputError("demo: give both --public and --faces, or neither for synthetic faces")
    if settings.is_private and settings.faces is not None:
        raise InputError("demo: its DP plan is made for synthetic faces: give --non-private with --public and --faces")
    count = 2 + 2 * settings.num_sites
    ports = list(range(settings.port, settings.port + count)) if settings.port else free_ports(count)
    for port in ports:
        check_port_free("127.0.0.1", port, "demo")
    for images in filter(None, (settings.public, settings.faces)):
        list_images(images)
    with own_folder(settings.out, say):
        kind = PrivateDemo if settings.is_private else Demo
        return kind(settings, budget, say, ports).run()
