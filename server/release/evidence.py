"""What a released model is shown with elsewhere: its card, figures, audits and epsilons in one signed file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from server.release.card import Evidence
from server.report.formatting import reference_label
from shared.errors import InputError
from shared.evidence.bundle import write_bundle
from shared.messages.signature import public_text, read_key
from shared.storage.checkpoint import CheckpointMeta

FILE = "evidence.zip"
_REQUEST_KEY = Path("pki", "request.pem")
CURE = "`maskfed-server renew --ca-key FILE` makes the request key"
EPSILON_MEANS = (
    "epsilon bounds what all updates of a site together tell about one unit (an image or a person) that is added to or "
    "removed from its data, at the delta beside it; by the PRV accountant (arXiv 2106.02848), an upper bound, for "
    "Poisson sampling and Gaussian noise made at the site. Units of several sites, and near-duplicates, add up."
)
AUDITS_MEAN = (
    "membership and memorisation: each site attacks the model with its own training and held-out images, knowing model "
    "and references, and releases noisy counts. canaries: each site attacks its own DP training with inserted images, "
    "knowing every update; lower bound on epsilon beside the ledger's."
)


def signing_key(run: Path) -> Ed25519PrivateKey | None:
    """The request key of the coordinator whose folder a run lies in; None for a run outside of any.

    Raises:
        InputError: the key is damaged, or readable by others.
    """
    file = run.resolve().parent.parent / _REQUEST_KEY
    return read_key(file, CURE) if file.exists() else None


def write_evidence(
    folder: Path, key: Ed25519PrivateKey, meta: CheckpointMeta, evidence: Evidence, facts: Mapping[str, Any]
) -> str:
    """Write `evidence.zip` beside what was released.

    Args:
        folder: the release: card, experiment, `meta.json`, whose digests name the weights.
        key: signs it.
        meta: the released checkpoint.
        evidence: with numbers for sites, unless they are to be named.
        facts: override and licence, as the card has them.

    Returns:
        The public key that checks it.
    """
    files = {
        file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.suffix in (".md", ".toml", ".json")
    }
    charges = [each.model_dump(mode="json") for each in evidence.mean_images]
    figures = {
        "distances.json": [_distance(each.result) for each in evidence.evaluations],
        "audits.json": {"what": AUDITS_MEAN, "audits": [_audit(each) for each in evidence.audits]},
        "epsilon.json": {"what": EPSILON_MEANS, "sites": evidence.epsilons, "mean_images": charges},
    }
    files |= {name: json.dumps(content, indent=1).encode() for name, content in figures.items()}
    told = {"kind": "release", "checkpoint": meta.digest, "round": meta.round, "step": meta.step, **facts}
    write_bundle(folder / FILE, key, told | {"problems": evidence.problems}, files)
    return public_text(key)


def _distance(result: Mapping[str, Any]) -> dict[str, Any]:
    """The figures with what they depend on; names of folders stay here."""
    kept = ("metrics", "intervals", "extractor", "num_images", "weights", "sampler", "nfe")
    told = {name: result[name] for name in kept if name in result}
    return told | {"reference": reference_label(result["reference"], names_sites=False)}


def _audit(audit: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("site", "audit", "passed", "reason", "figures", "checkpoint_digest")
    return {name: audit[name] for name in kept if name in audit}


def check(file: Path, key: str) -> list[str]:
    """A line per fact and file of a bundle that `key` has signed.

    Raises:
        InputError: it has not, or the bundle was changed.
    """
    from shared.evidence.verify import EvidenceError, summary, verify

    try:
        return summary(verify(file, key))
    except EvidenceError as error:
        raise InputError(f"{file}: not verified: {error}") from error
