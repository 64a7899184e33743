"""The bundle that Flower wants of every run: the code of this installation, which no process of ours unpacks.

Sites compare its digest with what their operators have approved. Uses flwr's internal builder;
`tests/server/federation/fleet/test_superlink.py` fails on another version.
"""

import io
import zipfile
from pathlib import Path

from flwr.cli.build import build_fab_from_files

import shared

_PROJECT = """\
[project]
name = "maskfed"
version = "1.0.0"
description = "Federated fine-tuning of masked-pretrained diffusion models"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "maskfed"
fab-include = ["server/**", "client/**", "shared/**"]

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "{client_app}"

[tool.flwr.app.config]
experiment = ""
run = ""
"""


SITES, VIRTUAL_SITES = "client.app:app", "client.simulated.app:app"
"""What the project file names as the sites' app. A real site runs the first, installed there, whatever it names."""


class BundleError(RuntimeError):
    """Flower builds no bundle that a site could approve."""


def build_bundle(client_app: str = SITES) -> bytes:
    """The Flower bundle: every `*.py` of server, client and shared, and a minimal project file; deterministic.

    Args:
        client_app: that of real sites, or that of a simulation's.

    Raises:
        BundleError: Flower leaves a file out; it drops names like `x_test.py`, and no site would approve the rest.
    """
    root = Path(shared.__file__).parent.parent
    files: dict[str, bytes | Path] = {"pyproject.toml": _PROJECT.format(client_app=client_app).encode()}
    for package in ("server", "client", "shared"):
        for path in sorted((root / package).rglob("*.py")):
            files[path.relative_to(root).as_posix()] = path.read_bytes()
    content = build_fab_from_files(files)[0]
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        missing = sorted(set(files) - set(archive.namelist()))
    if missing:
        raise BundleError(f"Flower's bundle leaves out {', '.join(missing)}: give these files other names")
    return content
