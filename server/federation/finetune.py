"""`maskfed-server finetune`: prepare a run's directory, or take one up again, and submit it."""

import re
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from server.federation.fleet.registry import Registry, write_json
from server.federation.fleet.superlink import connect
from server.federation.resubmission import Wanted
from server.federation.starting_point import (
    check_fits,
    check_room,
    check_sites,
    find_held_out,
    find_init,
    initial_model,
)
from server.federation.updates.global_model import save_global
from server.runs import run_directory
from server.runs.run_directory import RunDir
from shared.errors import InputError
from shared.experiment.config import Experiment, load_experiment
from shared.experiment.recipes import find_experiment
from shared.messages.agreement.plan import resolve
from shared.storage.checkpoint import load_meta
from shared.storage.files import write_atomically

RUN_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
_NEVER_FORCED = frozenset({"train.seed", "train.precision"})
_NEVER_FORCED_SECTIONS = frozenset({"privacy", "model", "data", "diffusion", "mask"})
"""Fields and sections that `--force` must not change in a run that has begun."""


@dataclass(frozen=True)
class Start:
    """What a new run starts from.

    Attributes:
        experiment: file or recipe name of the federated experiment.
        overrides: `section.key=value`, each.
        init: checkpoint or run directory whose moving average becomes the global model; empty: `train.init`.
        run: name; empty: the experiment's and the time.
        reference: images or statistics that checkpoints are compared with; empty: no evaluation.
        evaluate_arguments: further arguments of the evaluations.
        held_out: public images that every round is checked with; empty: the images of `reference`; `none`: no check.
    """

    experiment: str
    overrides: tuple[str, ...] = ()
    init: str = ""
    run: str = ""
    reference: str = ""
    evaluate_arguments: tuple[str, ...] = ()
    held_out: str = ""


@dataclass(frozen=True)
class PreparedRun:
    """A start that fits: what to train, from which checkpoint, under which name."""

    experiment: Experiment
    source: Path
    run: str


def prepare(home: Path, start: Start) -> PreparedRun:
    """Check everything that can be checked before anybody is asked.

    Raises:
        InputError: something does not fit.
    """
    file = find_experiment(start.experiment)
    experiment = resolve(load_experiment(file, list(start.overrides)))
    check_sites(experiment, len(Registry(home / "sites.json").active()))
    source = find_init(start.init or experiment.train.init)
    check_fits(source, experiment)
    run = start.run or f"{file.stem}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    check_name(run)
    return PreparedRun(experiment, source, run)


def start_run(home: Path, start: Start) -> str:
    """Check everything, write the run directory with the checkpoint of round 0, submit; the run's name.

    Raises:
        InputError: something does not fit; nothing is left behind.
        ControlError: the SuperLink cannot be reached; nothing is left behind.
    """
    ready = prepare(home, start)
    experiment, source, run = ready.experiment, ready.source, ready.run
    folder = home / "runs" / run
    if folder.exists():
        raise InputError(f"run {run} exists in {folder.parent}: give another --run, or continue it with --resume {run}")
    check_room(home, experiment, source)
    reference, held_out = _absolute(start.reference), find_held_out(start.held_out, start.reference)
    with connect(home) as control:
        control.nodes()
        try:
            made = run_directory.create(folder, experiment)
            write_json(
                made.settings,
                {
                    "init": str(source),
                    "reference": reference,
                    "evaluate_arguments": list(start.evaluate_arguments),
                    "held_out": held_out,
                },
            )
            save_global(made.round_checkpoint(0), initial_model(source, experiment), experiment)
            Wanted(home).submit(control, run)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    return run


def resume_run(home: Path, run: str, changed: Experiment | None = None, *, force: bool = False) -> bool:
    """Submit a run again, from its last complete checkpoint; false when it is running, so that there is nothing to do.

    A run whose ServerApp was killed counts as running until the SuperLink has noticed; then `maskfed-server start`, or
    a `status` that follows it, submits it again.

    Args:
        home: the coordinator's folder.
        run: its name.
        changed: an experiment to continue with instead of the stored one.
        force: take `changed` although it differs; never in seeds, precision, privacy, model or data.

    Raises:
        InputError: no such run, it is complete, the experiment is to change while it runs, or differs without `force`.
    """
    check_name(run)
    made = RunDir(home / "runs" / run)
    if not made.path.is_dir():
        known = sorted(path.name for path in made.path.parent.glob("*") if path.is_dir())
        raise InputError(f"run {run!r} is unknown: known are {', '.join(known) or 'none'}")
    entry = Wanted(home).runs().get(run)
    if changed is None and entry is not None and entry.status == "running":
        return False
    experiment = made.experiment
    if changed is not None:
        experiment = _merged(run, experiment, resolve(changed), force=force)
    newest = made.latest
    if newest is None:
        raise InputError(f"run {run} has no complete checkpoint: start it again under another name")
    done = load_meta(newest).round or 0
    if done >= experiment.federation.rounds:
        raise InputError(
            f"run {run} has done all {done} rounds: raise federation.rounds (--set, with --force) to continue"
        )
    check_sites(experiment, len(Registry(home / "sites.json").active()))
    with connect(home) as control:
        control.nodes()
        write_atomically(made.experiment_file, experiment.to_toml())
        Wanted(home).submit(control, run)
    return True


def check_name(run: str) -> None:
    """Refuse a run name that is not one plain folder name.

    Raises:
        InputError: says which characters are allowed.
    """
    if not re.fullmatch(RUN_PATTERN, run):
        raise InputError(f"run name {run!r}: 1 to 100 letters, digits, '.', '_' or '-', the first a letter or digit")


def _merged(run: str, stored: Experiment, asked: Experiment, *, force: bool) -> Experiment:
    found = run_directory.differences(stored, asked)
    fixed = [each for each in found if _is_never_forced(each.field)]
    listed = "; ".join(map(str, fixed if force else found))
    if found and not force:
        raise InputError(f"run {run} was started with {listed}: resume it unchanged, or give --force")
    if fixed:
        raise InputError(f"run {run} was started with {listed}: --force does not change that, start a new run")
    return asked


def _is_never_forced(field: str) -> bool:
    return field in _NEVER_FORCED or field.partition(".")[0] in _NEVER_FORCED_SECTIONS


def _absolute(reference: str) -> str:
    """Evaluations run elsewhere; `synthetic:...` is a name, not a path."""
    if not reference or reference.startswith("synthetic:"):
        return reference
    path = Path(reference).resolve()
    if not path.exists():
        raise InputError(f"reference {reference} does not exist: give images (folder, zip, cache) or statistics")
    return str(path)
