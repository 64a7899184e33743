"""An old `site.toml`: what becomes of its fields, and that nothing becomes allowed."""

import pytest

from client.policy.migration import differences, migrated
from client.settings import SitePolicy, load_settings, parse_settings
from shared.errors import InputError

OLD = {
    "schema_version": 1, "alias": "a", "address": "h:1", "data": "/d", "image_size": 16, "head_file": "/h/l.json",
    "policy": {"tasks": ["train", "audit"], "epsilon_cap": 3.5, "max_audits_per_day": 7, "audit_figures": True},
}  # fmt: skip


def test_old_fields_become_todays_and_no_audit_is_allowed_by_it():
    settings, notes = migrated(OLD, "site.toml")
    assert settings.policy == SitePolicy(tasks=("train", "audit"), epsilon_cap=3.5)
    assert settings.policy.audit.max_per_run == 0
    assert [note.split(":")[0] for note in notes] == ["max_audits_per_day", "audit_figures"]
    assert migrated(settings.model_dump(), "site.toml") == (settings, [])


def test_the_differences_are_shown_and_lead_to_the_new_file():
    import tomllib

    import tomli_w

    settings, _ = migrated(OLD, "site.toml")
    new, lines = differences(tomli_w.dumps(OLD), settings)
    assert parse_settings(tomllib.loads(new), "new") == settings
    assert "-max_audits_per_day = 7" in lines and "+[policy.audit]" in lines
    assert differences(new, settings)[1] == []


def test_an_old_file_is_refused_with_the_command_that_cures_it_and_other_faults_stay():
    with pytest.raises(InputError, match="maskfed-client policy migrate"):
        parse_settings(OLD, "site.toml")
    with pytest.raises(InputError, match="'typo'"):
        migrated({**OLD, "typo": 1}, "site.toml")


def test_the_command_shows_asks_writes_and_keeps_the_old_file(make_site):
    from typer.testing import CliRunner

    from client.cli.main import app

    home, settings = make_site()
    text = home.settings.read_text().replace("[policy.ranges]", "max_audits_per_day = 3\n\n[policy.ranges]", 1)
    home.settings.write_text(text)
    refused = CliRunner().invoke(app, ["policy", "migrate", "--home", str(home.path)], input="n\n")
    assert refused.exit_code == 1 and home.settings.read_text() == text
    assert "-max_audits_per_day = 3" in refused.stdout
    assert CliRunner().invoke(app, ["policy", "migrate", "--yes", "--home", str(home.path)]).exit_code == 0
    assert load_settings(home) == settings and (home.path / "site.toml.old").read_text() == text
    again = CliRunner().invoke(app, ["policy", "migrate", "--home", str(home.path)])
    assert "is up to date" in again.stdout
