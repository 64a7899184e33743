"""A release of a coordinator's run carries signed evidence; sites are numbers in it unless they are to be named."""

import json
import zipfile

import pytest
from typer.testing import CliRunner

from server.cli.main import app
from server.release.evidence import check
from server.release.gate import release
from shared.errors import InputError
from shared.messages.signature import public_text
from tests.server.release.test_gate import audited, finish, measure
from tests.signing import key_of, pem_of

KEY = key_of("coordinator")


@pytest.fixture
def run(tmp_path):
    home = tmp_path / "coordinator"
    (home / "pki").mkdir(parents=True)
    file = home / "pki" / "request.pem"
    file.write_bytes(pem_of(KEY))
    file.chmod(0o600)
    found, digest = finish(home / "runs" / "first", privacy="dp-sgd")
    measure(found, digest)
    audited(found, digest)
    return found


def contents(folder):
    with zipfile.ZipFile(folder / "evidence.zip") as archive:
        return {name: archive.read(name).decode() for name in archive.namelist()}


def test_it_holds_card_figures_audits_and_epsilons_and_is_verified(run, tmp_path):
    out = release(run.round_checkpoint(1), tmp_path / "out", license_text="ours")
    lines = check(out / "evidence.zip", public_text(KEY))
    assert "kind: release" in lines and "license: ours" in lines
    found = contents(out)
    assert found["MODEL_CARD.md"] == (out / "MODEL_CARD.md").read_text()
    (distance,) = json.loads(found["distances.json"])
    assert distance["intervals"] == {"fd_random_inception_192": [4.0, 5.0]}
    assert distance["reference"] == "held-out"
    epsilons = {each["site"]: each for each in json.loads(found["epsilon.json"])["sites"]}
    assert epsilons["site 1"]["epsilon"] == "3.25" and epsilons["site 1"]["unit"] == "person"
    assert len(json.loads(found["audits.json"])["audits"]) == 4
    assert (out / "evidence.zip").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("name_sites", [False, True])
def test_sites_are_named_only_on_request(run, tmp_path, name_sites):
    out = release(run.round_checkpoint(1), tmp_path / "out", name_sites=name_sites)
    text = " ".join(contents(out).values())
    assert ("north" in text) is name_sites
    assert "/home/somebody" not in text


def test_a_changed_bundle_and_another_key_are_one_line(run, tmp_path):
    out = release(run.round_checkpoint(1), tmp_path / "out")
    file = out / "evidence.zip"
    command = ["verify", str(file), "--key"]
    assert CliRunner().invoke(app, [*command, public_text(KEY)]).output.endswith("VERIFIED\n")
    with pytest.raises(InputError, match="not verified: signed with the key"):
        CliRunner().invoke(app, [*command, "0" * 64], catch_exceptions=False)
    file.write_bytes(file.read_bytes().replace(b"3.25", b"0.25"))
    with pytest.raises(InputError, match="not verified"):
        check(file, public_text(KEY))


def test_a_run_of_no_coordinator_has_none(tmp_path):
    run, digest = finish(tmp_path / "first")
    measure(run, digest)
    audited(run, digest)
    assert not (release(run.round_checkpoint(1), tmp_path / "out") / "evidence.zip").exists()
