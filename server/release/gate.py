"""The release gate: a model leaves only with its evidence, and only when the evidence is good enough.

A release is a checkpoint of the averaged weights with the experiment and a model card. It needs a measured distance
and the audits that `[release]` asks for, passed at every site that took part. An override stands in the card.
"""

import os
import shutil
from pathlib import Path
from typing import Any

from server.release.card import Evidence, model_card, pretraining_of, without_names
from server.release.evidence import signing_key, write_evidence
from server.report.formatting import format_number
from server.runs.history import Evaluation, RunData, read_run, spent_text
from server.runs.lineage import as_provenance, charges_of_weights
from server.runs.run_directory import RunDir
from shared.errors import InputError
from shared.experiment.config import Experiment
from shared.messages.text import escape_markdown
from shared.storage.checkpoint import CheckpointMeta, check_files, load_group, resolve_checkpoint, save_checkpoint
from shared.storage.files import TEMPORARY_PREFIX, with_name

RELEASED_MODE = 0o644
CARD_FILE, EXPERIMENT_FILE = "MODEL_CARD.md", "experiment.toml"
LICENSE = "Apache-2.0 for the code; the weights' licence is the coordinator's to state (--license)"


def gather(checkpoint: Path) -> Evidence:
    """Evidence of a checkpoint from its run directory: evaluations, audit verdicts, who took part, epsilon.

    Raises:
        InputError: damaged checkpoint, or one that lies in no run.
    """
    meta = check_files(checkpoint)
    folder = checkpoint.resolve().parent
    if folder.name != "checkpoints":
        raise InputError(f"checkpoint {checkpoint} lies in no run, so nothing is known of it: name a run's checkpoint")
    data = read_run(folder.parent)
    last_round = meta.round if meta.round is not None else 0
    evaluations = [each for each in data.evaluations if is_of_release(each, meta)]
    own = [each for each in data.audits if each.get("checkpoint_digest") == meta.digest]
    audits = [{**each, "reason": escape_markdown(str(each.get("reason", "")))} for each in own]
    sites = data.participants(last_round)
    problems = [] if evaluations else [f"no distance of {checkpoint.name} was measured: run `maskfed-server evaluate`"]
    problems += audit_problems(meta.experiment, audits, sites)
    return Evidence(
        digest=meta.digest,
        evaluations=evaluations,
        audits=audits,
        sites=sites,
        epsilons=epsilons(data, sites, last_round),
        problems=problems,
        num_changed=len(data.changed_rounds(last_round)),
        pretraining=pretraining_of(RunDir(data.path), meta),
        mean_images=charges_of_weights(meta.provenance),
    )


def is_of_release(evaluation: Evaluation, meta: CheckpointMeta) -> bool:
    """Whether a distance is of a checkpoint's averaged weights: its own, or an earlier one's with the same."""
    found = evaluation.result["checkpoint"]
    is_same = found.get("digest") == meta.digest or found.get("weights_sha256") == meta.sha256.get("ema.safetensors")
    return is_same and evaluation.result.get("weights") == "ema"


def audit_problems(experiment: Experiment, audits: list[dict[str, Any]], sites: list[str]) -> list[str]:
    """Required audits that are missing, failed, or beyond the limits by their own figures.

    Without sites (central training) one audit of each kind suffices, whoever ran it.
    """
    config = experiment.release
    bounds = {
        "copy_rate": config.max_copy_rate,
        "auc": config.max_auc,
        "copied": config.max_copy_rate,
        "tpr_at_1_percent_fpr": config.max_tpr,
    }
    found = {(each.get("site"), each.get("audit")): each for each in audits}
    by_kind = {each.get("audit"): each for each in audits}
    problems = []
    for site in sites or ["the training data"]:
        for kind in experiment.required_audits:
            done = found.get((site, kind)) if sites else by_kind.get(kind)
            if done is None:
                ask = "maskfed-server audit --canaries" if kind == "canaries" else "maskfed-server audit"
                problems.append(f"{kind} audit of {site} is missing: ask with `{ask}`, or give --verdict")
            elif not done.get("passed"):
                problems.append(f"{kind} audit of {site} failed{': ' + done['reason'] if done.get('reason') else ''}")
            else:
                problems += [
                    f"{kind} audit of {site}: {name} {format_number(value)} is above the limit {bounds[name]:g}"
                    for name, value in done.get("figures", {}).items()
                    # What is no number passes no limit.
                    if name in bounds and not (isinstance(value, int | float) and value <= bounds[name])
                ]
    return problems


def epsilons(data: RunData, sites: list[str], last_round: int) -> list[dict[str, str]]:
    """What each site has spent, as its last reply said; `unbounded` where nothing bounds it."""
    is_private = data.experiment.privacy.mechanism != "none"
    found = []
    for site in sites:
        entries = [
            entry
            for event in data.rounds
            if event["round"] <= last_round
            for entry in event.get("answered", [])
            if entry["site"] == site and "epsilon" in entry
        ]
        if not entries:
            value = "not released" if is_private else "unbounded"
            found.append(
                {"site": site, "epsilon": value, "delta": "–", "cap": "–", "unit": data.experiment.privacy.unit}
            )
        else:
            last = entries[-1]
            found.append(
                {
                    "site": site,
                    "epsilon": spent_text(last),
                    "delta": "–" if last.get("delta") is None else f"{last['delta']:g}",
                    "cap": format_number(last.get("epsilon_cap")),
                    "unit": str(last.get("unit") or "–"),
                }
            )
    return found


def release(
    path: Path, out: Path, *, override: str = "", license_text: str = LICENSE, name_sites: bool = False
) -> Path:
    """Write the release folder: averaged weights, experiment, card, and for a coordinator's run signed evidence.

    Args:
        path: checkpoint folder of a run, or a run directory (its newest).
        out: new folder.
        override: reason to release although evidence is missing or bad; recorded in the card and `meta.json`.
        license_text: licence of the weights.
        name_sites: whether card and `meta.json` name the sites; otherwise they are numbered.

    Returns:
        The folder.

    Raises:
        InputError: the evidence does not suffice, no averaged weights, or `out` has content.
    """
    checkpoint, out = resolve_checkpoint(path), with_name(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out} is not an empty folder: name a new one")
    meta, evidence = check_files(checkpoint), gather(checkpoint)
    if "ema.safetensors" not in meta.sha256:
        raise InputError(f"checkpoint {checkpoint} has no EMA weights: only the moving average is released")
    if evidence.problems and not override.strip():
        problems = "; ".join(evidence.problems)
        raise InputError(f"{checkpoint.name} is not released: {problems}; --override REASON records why")
    if not name_sites:
        evidence = without_names(evidence)
    unfinished = out.with_name(f"{TEMPORARY_PREFIX}{out.name}-{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        facts = {"override": override.strip(), "problems": evidence.problems, "released_from": evidence.digest}
        save_checkpoint(
            unfinished,
            {"ema": load_group(checkpoint, "ema")},
            {
                "experiment": meta.experiment,
                "step": meta.step,
                "round": meta.round,
                "parents": (meta.digest,),
                "provenance": {"release": facts, **as_provenance(evidence.mean_images)},
            },
        )
        (unfinished / EXPERIMENT_FILE).write_text(meta.experiment.to_toml(), encoding="utf-8")
        card = model_card(checkpoint.name, meta, evidence, override.strip(), license_text, names_sites=name_sites)
        (unfinished / CARD_FILE).write_text(card, encoding="utf-8")
        if key := signing_key(checkpoint.resolve().parent.parent):
            write_evidence(unfinished, key, meta, evidence, {"override": override.strip(), "license": license_text})
        for file in unfinished.iterdir():
            # Writers of tensors make files that only their owner reads; a release is for others.
            file.chmod(RELEASED_MODE)
        if out.exists():
            out.rmdir()
        out.parent.mkdir(parents=True, exist_ok=True)
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return out
