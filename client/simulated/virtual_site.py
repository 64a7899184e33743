"""A virtual site of `maskfed-server simulate`: its folder is made when its first message comes.

Only a process whose environment names a simulation can use this; the app of real sites does not import it.
"""

import hashlib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path

from client.data.dataset import scan
from client.home import Home
from client.private_files import write_private
from client.records.data_registry import REGISTRY_VARIABLE
from client.settings import parse_settings, save_settings

SIMULATION_VARIABLE = "MASKFED_SIMULATION"


def simulation_folder() -> Path:
    """The folder of the simulation that this process belongs to; a process of none has no business here."""
    return Path(os.environ[SIMULATION_VARIABLE])


def home_of(node_config: Mapping[str, object]) -> Home:
    """Home of the virtual node, `sites/site-<partition>` in the simulation's folder.

    Raises:
        InputError: no usable images for this site.
    """
    root = simulation_folder()
    os.environ[REGISTRY_VARIABLE] = str(root / "registry")
    home = Home(root / "sites" / f"site-{node_config['partition-id']}")
    if not home.settings.exists():
        _make(home, root)
    return home


def _make(home: Home, root: Path) -> None:
    """Settings from the simulation's template, a secret that repeats with its seed, and the image cache."""
    template = tomllib.loads((root / "site.toml").read_text(encoding="utf-8"))
    alias, seed = home.path.name, template.pop("seed")
    own = {"alias": alias, "data": str(root / "images" / alias), "head_file": str(root / "heads" / f"{alias}.json")}
    settings = parse_settings({**template, **own}, "simulation")
    home.path.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_private(home.data_key, hashlib.sha256(f"simulation {seed} {alias}".encode()).digest())
    scan(home, settings)
    save_settings(home, settings)
