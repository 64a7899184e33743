"""What `join` says before anything is scanned."""

import pytest

from client.answers.audit_power import foreseen, least_units
from client.cli.confirm_persons import warn_of_audits
from client.limits import AuditPolicy
from client.settings import SiteConfig, SitePolicy

AUDIT = AuditPolicy(max_per_run=1)


@pytest.mark.parametrize(
    ("tasks", "unit", "persons", "words"),
    [
        (("train", "audit"), "person", ("a", "a", "b", "b"), "about 2 persons are here"),
        (("train", "audit"), "image", ("a", "a", "b", "b"), "about 4 images are here"),
        (("train", "audit"), "image", None, "about 24 images are here"),
        (("train",), "image", ("a", "b"), ""),
    ],
)
def test_too_few_units_for_an_audit_are_told_before_the_scan(tasks, unit, persons, words, photos, capsys):
    policy = SitePolicy(tasks=tasks, unit=unit, audit=AUDIT)
    settings = SiteConfig(
        alias="site", address="127.0.0.1:1", data=str(photos), image_size=16, held_out_ratio=0.5,
        head_file="/head", policy=policy,
    )  # fmt: skip
    warn_of_audits(settings, persons)
    said = capsys.readouterr().out
    assert words in said and bool(said) == bool(words)
    assert not words or f"audits need {2 * least_units(AUDIT)}" in said


def test_enough_units_are_no_matter():
    least = least_units(AUDIT)
    assert foreseen(2 * least, 0.5, "person", AUDIT) == ""
    assert foreseen(2 * least - 2, 0.5, "person", AUDIT) != ""
    assert foreseen(10 * least, 0.95, "image", AUDIT) != "", "too few are trained on"
