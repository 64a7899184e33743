"""`maskfed-server simulate`: the same apps with many virtual sites on one machine, on Flower's Ray runtime.

No TLS and no keys: everything is on loopback and of one user. The virtual sites keep ledgers and refuse like real
ones; `client/simulated/` makes their folders from the template written here. One that was cut off goes on.
"""

import importlib.util
import os
import time
from dataclasses import dataclass
from pathlib import Path

import tomli_w
from rich.console import Console
from rich.live import Live

from server.federation.fleet.registry import write_json
from server.federation.fleet.superlink import Control
from server.federation.fleet.superlink_types import Simulation
from server.federation.resubmission import WantedRun
from server.federation.starting_point import (
    UNWATCHED,
    check_fits,
    check_sites,
    find_held_out,
    find_init,
    initial_model,
)
from server.federation.status import EXIT_CODES, summarise, table
from server.federation.updates.global_model import save_global
from server.runs import run_directory
from server.simulation.adversaries import parse_adversaries, write_adversaries
from server.simulation.division import Skew, make_site_folders
from server.simulation.runtime import simulation_runtime
from server.simulation.simulation_folder import ASKED_FILE, RUN, check_same, is_complete, outcome, run_of
from server.simulation.virtual_keys import make_keys
from shared.errors import InputError
from shared.experiment.config import Experiment, load_experiment
from shared.experiment.recipes import find_experiment
from shared.messages.agreement.plan import resolve
from shared.storage.checkpoint import load_meta


@dataclass(frozen=True)
class Simulate:
    """What is simulated.

    Attributes:
        experiment: file or recipe name.
        overrides: `section.key=value`, each.
        init: checkpoint to start from; empty: `train.init`.
        num_sites: virtual sites.
        data: folder, zip, or `synthetic:<images per site>`.
        skew: how images are divided.
        alpha: concentration of the Dirichlet division.
        out: folder for everything, new or of the same simulation.
        num_cpus: that Ray may use; 0: all.
        cpus_per_site: of one virtual site while it trains.
        gpus_per_site: share of a GPU for one virtual site; 0: train on the CPU.
        adversary: `KIND[:SITES[:STRENGTH]]`, some of the sites; empty: all are honest.
        held_out: public images that rounds are checked with; empty: nothing watches them.
    """

    experiment: str
    overrides: tuple[str, ...]
    init: str
    num_sites: int
    data: str
    skew: Skew
    alpha: float
    out: Path
    num_cpus: int
    cpus_per_site: int
    gpus_per_site: float
    adversary: str = ""
    held_out: str = ""


def simulate(options: Simulate, console: Console) -> int:
    """Run the simulation, or the rounds of it that are left, and show it; the exit code: 0 completed, 1 failed.

    Raises:
        InputError: bad input, before anything is started.
        ControlError: the runtime did not start.
    """
    experiment = prepare(options)
    if is_complete(options.out):
        console.print(table(summarise(options.out, WantedRun(run=RUN, run_id=0, status="completed"))))
        return 0
    if not find_held_out(options.held_out):
        console.print(UNWATCHED, markup=False)
    make_keys(options.out, options.num_sites)
    num_gpus = -(-options.gpus_per_site // 1)
    limits = Simulation(
        options.num_sites,
        options.cpus_per_site,
        options.gpus_per_site,
        options.num_cpus or len(os.sched_getaffinity(0)),
        int(num_gpus),
    )
    with simulation_runtime(options.out) as control:
        run_id = control.submit(experiment, RUN, limits)
        return _follow(options.out, control, run_id, console)


def prepare(options: Simulate) -> Experiment:
    """Images by site, the sites' settings, and the run directory with round 0; nothing where they are there already.

    Raises:
        InputError: bad input, or the folder holds something else.
    """
    if importlib.util.find_spec("ray") is None:
        raise InputError("simulate needs Ray: install the extra, `uv pip install 'maskfed[simulation]'`")
    experiment = resolve(load_experiment(find_experiment(options.experiment), list(options.overrides)))
    check_sites(experiment, options.num_sites)
    source = find_init(options.init or experiment.train.init)
    check_fits(source, experiment)
    adversaries = parse_adversaries(options.adversary, options.num_sites) if options.adversary else None
    if adversaries is not None and experiment.federation.secure:
        raise InputError("--adversary does not go with federation.secure: an adversary changes what it sends openly")
    held_out = find_held_out(options.held_out)
    asked = _asked(options, experiment, source)
    if (options.out / ASKED_FILE).exists():
        check_same(options.out, asked)
        return experiment
    if options.out.exists() and any(options.out.iterdir()):
        raise InputError(f"folder {options.out} is not empty and holds no simulation: name another one with --out")
    size, seed = experiment.model.image_size, experiment.train.seed
    make_site_folders(options.data, options.out / "images", options.num_sites, size, options.skew, options.alpha, seed)
    if adversaries is not None:
        write_adversaries(options.out, adversaries, options.num_sites, size, seed)
    template = _site_template(experiment, options.gpus_per_site)
    (options.out / "site.toml").write_text(tomli_w.dumps(template), encoding="utf-8")
    made = run_directory.create(run_of(options.out).path, experiment)
    write_json(made.settings, {"init": str(source), "held_out": held_out})
    save_global(made.round_checkpoint(0), initial_model(source, experiment), experiment)
    write_json(options.out / ASKED_FILE, asked)
    return experiment


def _asked(options: Simulate, experiment: Experiment, source: Path) -> dict[str, object]:
    """What must be the same for a simulation to go on; how many CPUs it may use is not."""
    return {
        "experiment": experiment.model_dump(mode="json"),
        "init": load_meta(source).digest,
        "sites": options.num_sites,
        "data": options.data if options.data.startswith("synthetic:") else str(Path(options.data).resolve()),
        "division": f"{options.skew} {options.alpha:g}",
        "gpus_per_site": options.gpus_per_site,
        "adversary": options.adversary,
        "held_out": options.held_out,
    }


def _site_template(experiment: Experiment, gpus_per_site: float) -> dict[str, object]:
    """`site.toml` of every virtual site but for its name: a policy that accepts what is simulated, and charges it."""
    is_private = experiment.privacy.mechanism != "none"
    policy = {
        "tasks": ["train"],
        "experiments": "any",
        "require_dp": is_private,
        "unit": experiment.privacy.unit,
        "epsilon_cap": 1000.0,
        "min_noise_multiplier": 0.01,
        "max_steps_per_round": 1_000_000,
        "max_rounds_per_day": 1_000_000,
        "image_count": "hidden" if is_private else "exact",
        "release_scalars": ["loss", "seconds"],
        "secure": {"rosters": "any"},
    }
    return {
        "seed": experiment.train.seed,
        "address": "simulation:1",
        "image_size": experiment.model.image_size,
        "held_out_ratio": 0.0,
        "device": "cuda" if gpus_per_site else "cpu",
        "threads": 1,
        "policy": policy,
    }


def _follow(out: Path, control: Control, run_id: int, console: Console) -> int:
    entry = WantedRun(run=RUN, run_id=run_id)
    with Live(console=console, refresh_per_second=2) as live:
        while True:
            state = control.run_state(run_id)
            if state.is_finished:
                entry = entry.model_copy(update=outcome(out, state.details))
            live.update(table(summarise(out, entry)))
            if state.is_finished:
                break
            time.sleep(1)
    if entry.reason:
        console.print(f"simulation {entry.status}: {entry.reason}; see {out / 'runtime.log'}", markup=False)
    return EXIT_CODES[entry.status]
