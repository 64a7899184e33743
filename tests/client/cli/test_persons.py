"""What `join` says before anything is scanned."""

import pytest

from client.answers.audit_power import least_units, likely_too_few
from client.cli.persons import warn_of_audits
from client.limits import AuditPolicy
from client.settings import SiteConfig, SitePolicy

AUDIT = AuditPolicy(max_per_run=1)


@pytest.mark.parametrize(
    ("tasks", "unit", "persons", "words"),
    [
        (("train", "audit"), "person", ("a", "a", "b", "b"), "of 2 persons about 1 will be held out"),
        (("train", "audit"), "image", ("a", "a", "b", "b"), "of 4 images about 2 will be held out"),
        (("train", "audit"), "image", None, "of 24 images about 12 will be held out"),
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
    assert not words or f"needs {least_units(AUDIT)} of them" in said


def test_enough_units_are_no_matter():
    least = least_units(AUDIT)
    assert likely_too_few(2 * least, 0.5, "person", AUDIT) == ""
    assert likely_too_few(2 * least - 2, 0.5, "person", AUDIT) != ""
    assert likely_too_few(10 * least, 0.95, "image", AUDIT) != "", "too few are trained on"
