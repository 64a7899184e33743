"""A `site.toml` of an older version as today's: fields that are gone become what took their place, the rest stays."""

import difflib
from collections.abc import Mapping
from typing import Any

import tomli_w

from client.settings import SiteConfig, parse_settings

GONE = {
    "max_audits_per_day": "a limit per run and a charge took its place: [policy.audit] max_per_run",
    "audit_figures": "exact figures no longer leave on request; `audit --out --figures` is the operator's own way",
}
"""Fields of `[policy]` of earlier versions, and what became of them."""


def migrated(tree: Mapping[str, Any], name: str) -> tuple[SiteConfig, list[str]]:
    """Today's settings, every field written out, and one line for each field that is gone.

    Nothing becomes allowed that was not: a field that is new has its default, and of audits none are allowed until the
    operator says how many a run may have.

    Raises:
        InputError: another fault than an old field.
    """
    policy = dict(tree.get("policy", {}))
    notes = [f"{field}: {why}" for field, why in GONE.items() if policy.pop(field, None) is not None]
    return parse_settings({**tree, "policy": policy}, name), notes


def differences(old: str, settings: SiteConfig) -> tuple[str, list[str]]:
    """The new text of `site.toml`, and how it differs from the old one, in lines of a unified diff."""
    new = tomli_w.dumps(settings.model_dump(mode="json"))
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), "site.toml", "site.toml (new)", lineterm="", n=1)
    return new, list(lines)
