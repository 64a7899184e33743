"""A virtual site of `maskfed-server simulate`: its folder is made when its first message comes.

Only a process whose environment names a simulation gets here; `maskfed-client start` hands no such variable on.
"""

import hashlib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path

from client.data.dataset import scan
from client.records.data_registry import REGISTRY_VARIABLE
from client.settings import Home, find_home, parse_settings, save_settings, write_private

SIMULATION_VARIABLE = "MASKFED_SIMULATION"


def home_of(node_config: Mapping[str, object]) -> Home:
    """The site's home; in a simulation that of the virtual node, `sites/site-<partition>` in the simulation's folder.

    Raises:
        InputError: no usable images for this site.
    """
    root = os.environ.get(SIMULATION_VARIABLE)
    if not root:
        return find_home()
    os.environ[REGISTRY_VARIABLE] = str(Path(root) / "registry")
    home = Home(Path(root) / "sites" / f"site-{node_config['partition-id']}")
    if not home.settings.exists():
        _make(home, Path(root))
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
