"""Checkpoints on disk: a folder of safetensors groups and a `meta.json` that carries their digests. No torch here."""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save_file as save_safetensors

from shared.errors import InputError
from shared.experiment.config import Experiment, explain
from shared.storage.files import TEMPORARY_PREFIX, file_digest, machine_errors, remove_folder, sync_file
from shared.storage.versions import git_commit, installed_versions

SCHEMA_VERSION = 1
META_FILE = "meta.json"
_NUMBERED = re.compile(r"(step|round)-(\d+)")

log = logging.getLogger(__name__)

Groups = dict[str, dict[str, np.ndarray]]


class CheckpointMeta(BaseModel):
    """`meta.json`: where the weights come from and what their files must hash to."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_version: int = Field(alias="schema")
    experiment: Experiment
    """The resolved experiment of the stage that wrote the checkpoint."""
    step: int | None = None
    """Optimizer steps done, for a central training."""
    round: int | None = None
    """Rounds done, for a federated run."""
    parents: tuple[str, ...] = ()
    """Digests of the checkpoints that the stage started from."""
    sha256: dict[str, str] = {}
    """Hex digest of every file of the folder."""
    versions: dict[str, str] = {}
    commit: str | None = None
    provenance: dict[str, Any] = {}
    """Anything else worth telling: command, data, hardware, import source."""

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical meta; it covers all weights through their files' digests."""
        tree = self.model_dump(mode="json", by_alias=True)
        return hashlib.sha256(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def save_checkpoint(folder: Path, groups: Groups, meta: Mapping[str, Any]) -> CheckpointMeta:
    """Write a checkpoint so that a reader sees all of it or nothing, whatever crashes.

    Args:
        folder: the checkpoint's own folder, for example `<run>/checkpoints/step-000010000`; replaced if it exists.
        groups: tensors by group (`model`, `ema`, `server`, `optimizer`), each becoming `<group>.safetensors`.
        meta: `CheckpointMeta` fields; schema, digests, versions and commit are filled in here.

    Returns:
        The meta as written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f"{TEMPORARY_PREFIX}{folder.name}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        digests = {f"{name}.safetensors": _write_group(temporary, name, tensors) for name, tensors in groups.items()}
        facts = {"versions": installed_versions(), "commit": git_commit(), **meta}
        full = CheckpointMeta.model_validate({**facts, "schema": SCHEMA_VERSION, "sha256": digests})
        text = json.dumps(full.model_dump(mode="json", by_alias=True), indent=2) + "\n"
        (temporary / META_FILE).write_text(text, encoding="utf-8")
        sync_file(temporary / META_FILE)
        sync_file(temporary)
        remove_folder(folder)
        temporary.rename(folder)
        sync_file(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return full


def load_meta(folder: Path) -> CheckpointMeta:
    """Meta of the checkpoint in `folder`.

    Raises:
        InputError: no checkpoint there, damaged, or of another schema.
    """
    path = folder / META_FILE
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"checkpoint {folder}: no readable {META_FILE} ({error.strerror}); give the folder that holds it"
        ) from error
    except ValueError as error:
        raise InputError(f"checkpoint {folder}: {META_FILE} is not valid JSON; restore it from a copy") from error
    schema = tree.get("schema") if isinstance(tree, dict) else None
    if schema != SCHEMA_VERSION:
        raise InputError(
            f"checkpoint {folder}: schema {schema!r}, this version reads {SCHEMA_VERSION}; "
            "use the maskfed version that wrote it"
        )
    try:
        return CheckpointMeta.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"checkpoint {folder}: {META_FILE}: {explain(error)}") from error


def load_group(folder: Path, group: str) -> dict[str, np.ndarray]:
    """Tensors of one group, after its file's digest has been checked.

    Raises:
        InputError: the group is missing, or its file is not the one the checkpoint was written with.
    """
    meta = load_meta(folder)
    name = f"{group}.safetensors"
    if name not in meta.sha256:
        held = ", ".join(sorted(file.removesuffix(".safetensors") for file in meta.sha256))
        raise InputError(f"checkpoint {folder}: no group {group!r}, it holds {held}")
    try:
        data = (folder / name).read_bytes()
    except OSError as error:
        raise InputError(f"checkpoint {folder}: {name}: {error.strerror}; restore it from a copy") from error
    found = hashlib.sha256(data).hexdigest()
    if found != meta.sha256[name]:
        raise InputError(
            f"checkpoint {folder}: {name} has digest {found[:12]}, {META_FILE} says {meta.sha256[name][:12]}; "
            "it was changed or damaged: restore it from a copy"
        )
    try:
        return load_safetensors(data)
    except (SafetensorError, KeyError, TypeError, AttributeError) as error:  # the latter for types NumPy lacks
        raise InputError(f"checkpoint {folder}: {name} is not a safetensors file ({error})") from error


def resolve_checkpoint(path: Path) -> Path:
    """The checkpoint folder that `path` means: itself, or the newest one of a run directory.

    Raises:
        InputError: neither.
    """
    if (path / META_FILE).exists():
        return path
    newest = latest_checkpoint(path / "checkpoints")
    if newest is None:
        raise InputError(f"checkpoint {path}: neither a checkpoint folder nor a run directory with one")
    return newest


def latest_checkpoint(checkpoints: Path) -> Path | None:
    """The newest complete `step-*` or `round-*` folder; damaged ones are skipped with a warning."""
    for folder in reversed(list_checkpoints(checkpoints)):
        try:
            check_files(folder)
        except InputError as error:
            log.warning("skipped: %s", error)
            continue
        return folder
    return None


def check_files(folder: Path) -> CheckpointMeta:
    """Check that every file of a checkpoint is there and has the digest of its meta.

    Raises:
        InputError: otherwise.
    """
    meta = load_meta(folder)
    for name, expected in meta.sha256.items():
        path = folder / name
        if not path.is_file():
            raise InputError(f"checkpoint {folder}: {name} is missing; restore it from a copy")
        if file_digest(path) != expected:
            raise InputError(f"checkpoint {folder}: {name} does not have the digest in {META_FILE}; restore it")
    return meta


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """All `step-*` and `round-*` folders, oldest first; temporary ones are not among them."""
    if not checkpoints.is_dir():
        return []
    folders = [path for path in checkpoints.iterdir() if _NUMBERED.fullmatch(path.name) and path.is_dir()]
    return sorted(folders, key=checkpoint_number)


def checkpoint_number(folder: Path) -> int:
    """Step or round in a checkpoint folder's name.

    Raises:
        InputError: the name is not `step-N` or `round-N`.
    """
    match = _NUMBERED.fullmatch(folder.name)
    if match is None:
        raise InputError(f"checkpoint {folder}: the name is not step-N or round-N; rename it")
    return int(match[2])


def prune_checkpoints(checkpoints: Path, keep_last: int, keep_every: int) -> None:
    """Delete all but the `keep_last` newest and those whose number is a multiple of `keep_every` (0: none).

    Leftovers of crashed writers go too, so only the run's one writer may call this.
    """
    folders = list_checkpoints(checkpoints)
    for folder in folders[:-keep_last]:
        if not (keep_every and checkpoint_number(folder) % keep_every == 0):
            remove_folder(folder)
    for leftover in checkpoints.glob(f"{TEMPORARY_PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _write_group(folder: Path, group: str, tensors: Mapping[str, np.ndarray]) -> str:
    path = folder / f"{group}.safetensors"
    arrays = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    with machine_errors(path):
        save_safetensors(arrays, path)
    sync_file(path)
    return file_digest(path)
