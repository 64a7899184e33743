"""`result.json`: what an evaluation's folder says of it, and whose folder it is."""

import hashlib
import json
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from server.evaluation.measures.scores import Scores
from server.evaluation.reference import Reference
from server.runs.run_directory import RunDir
from shared.errors import InputError
from shared.evaluation.feature_statistics import FeatureSpace
from shared.storage.files import with_name, write_atomically
from shared.storage.versions import git_commit, installed_versions

RESULT_FILE, PARTS_FOLDER = "result.json", "parts"
_LONGEST_PART = 80
_SAME = {
    "model": ("checkpoint", "digest"),
    "weights": ("weights",),
    "samples": ("samples", "sha256"),
    "reference": ("reference", "sha256"),
    "network": ("extractor", "sha256"),
    "layer": ("extractor", "layer"),
    "number of images": ("num_images",),
    "sampler": ("sampler",),
    "steps": ("steps",),
    "eta": ("eta",),
    "clip_x_0": ("clip_x_0",),
    "rederive_eps": ("rederive_eps",),
    "ddim_grid": ("ddim_grid",),
    "seed": ("seed",),
    "precision": ("precision",),
}
"""What decides a figure, and where it stands in the result: a folder holds the result of one set of these."""


def run_of(checkpoint: Path) -> RunDir | None:
    """The run that a checkpoint folder lies in."""
    folder = checkpoint.resolve().parent
    run = RunDir(folder.parent)
    return run if folder.name == "checkpoints" and run.experiment_file.exists() else None


def folder_name(what: str, space: FeatureSpace, reference: str, facts: Mapping[str, object]) -> str:
    """The name that an evaluation's folder has by itself: another one for everything that changes the figure.

    Args:
        what: the checkpoint's or the samples' name.
        space: of the features.
        reference: as the user named it.
        facts: of the images.
    """
    told = json.dumps([reference, vars(space), facts], sort_keys=True, default=str)
    key = hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    parts = (re.sub(r"[^A-Za-z0-9._+-]+", "-", part)[:_LONGEST_PART] for part in (what, space.distance_name))
    return "-".join((*parts, key))


@contextmanager
def owned_folder(folder: Path) -> Iterator[None]:
    """An evaluation's folder; one that holds something else is refused, and one that stays empty does not stay.

    Raises:
        InputError: other files lie in it.
    """
    is_ours = any((folder / name).exists() for name in (RESULT_FILE, PARTS_FOLDER))
    others = [] if is_ours or not folder.is_dir() else sorted(each.name for each in folder.iterdir())
    if others:
        raise InputError(f"{folder} holds other files ({others[0][:80]!r}): give another --name or --out")
    try:
        yield
    finally:
        with suppress(OSError):
            with_name(folder).rmdir()


def refuse_other_result(folder: Path, facts: Mapping[str, Any]) -> None:
    """Refuse to replace the result of another evaluation.

    Args:
        folder: the evaluation's.
        facts: of the evaluation that is about to begin, as in `result.json`.

    Raises:
        InputError: naming what differs.
    """
    file = folder / RESULT_FILE
    if not file.exists():
        return
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise InputError(f"{file} is damaged: delete it, or give another --name or --out")
    for name, keys in _SAME.items():
        theirs, ours = (_value(each, keys) for each in (found, facts))
        if theirs != ours:
            raise InputError(
                f"{folder} holds the result of another evaluation ({name} is {_short(theirs)}, not {_short(ours)}): "
                "give another --name or --out"
            )


def _value(tree: Any, keys: tuple[str, ...]) -> Any:  # noqa: ANN401  # JSON
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def _short(value: object) -> str:
    return "none" if value is None else str(value)[:20]


def facts_of(space: FeatureSpace, reference: Reference, num_images: int) -> dict[str, Any]:
    """What every result says of the measuring itself."""
    statistics = reference.statistics
    return {
        "extractor": vars(space),
        "reference": {
            "name": reference.name,
            "n": statistics.n,
            "sha256": reference.sha256,
            "release": statistics.release,
            "epsilon": statistics.epsilon,
            "delta": statistics.delta,
            "sites": statistics.site,
            "unreadable": reference.num_unreadable,
            "ignored": dict(reference.ignored),
        },
        "num_images": num_images,
    }


def write_result(folder: Path, found: Scores, facts: Mapping[str, Any]) -> Path:
    """Write `result.json`: figures first, then where they come from."""
    figures = {"metrics": found.metrics, "intervals": found.intervals, "left_out": found.left_out, "noise": found.noise}
    origin = {
        "versions": installed_versions(),
        "commit": git_commit(),
        "command": shlex.join(["maskfed-server", *sys.argv[1:]]),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    file = folder / RESULT_FILE
    write_atomically(file, json.dumps({**figures, **facts, **origin}, indent=2) + "\n")
    return file
