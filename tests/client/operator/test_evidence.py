"""What a site shows of a run is signed, complete for that run, and tells nothing of its images."""

import json
import zipfile

import pytest

from client.cli.records import evidence
from client.operator.evidence import write_evidence
from client.policy.approval import approve
from client.privacy.epsilon import epsilon_of
from client.records.spending import Spending
from client.training_request import handle
from shared.errors import InputError
from shared.evidence.verify import verify
from shared.messages.signature import public_text
from tests.client.conftest import DP, MakeSite, experiment, request_for
from tests.signing import key_of


def contents(file):
    with zipfile.ZipFile(file) as archive:
        return {name: json.loads(archive.read(name)) for name in archive.namelist() if name.endswith(".json")}


def test_it_holds_the_runs_charges_totals_requests_and_policy(make_site: MakeSite, tmp_path, capsys):
    home, settings = make_site(epsilon_cap=50.0)
    handle(request_for(experiment(privacy=DP)).to_record(), home)
    out = tmp_path / "run.zip"
    evidence("run", out, home.path)
    key = public_text(key_of(settings.alias))
    assert f"--key {key}" in capsys.readouterr().out
    manifest = verify(out, key)
    assert (manifest["kind"], manifest["site"], manifest["run"]) == ("site", "site0", "run")
    found = contents(out)
    (charge,) = found["spending.json"]["charges"]
    assert (charge["noise_multiplier"], charge["sample_rate"], charge["steps"]) == (1.0, 0.2, 2)
    assert charge["is_completed"] is True
    (total,) = found["spending.json"]["totals"].values()
    assert total["epsilon"] == pytest.approx(epsilon_of([Spending(1.0, 0.2, 2)], 1e-5))
    assert (total["unit"], total["cap"]) == ("image", 50.0)
    assert [entry["kind"] for entry in found["journal.json"]] == ["request", "release"]
    assert found["policy.json"]["epsilon_cap"] == 50.0


def test_images_files_and_folders_stay_at_the_site(make_site: MakeSite, tmp_path, photos):
    home, settings = make_site()
    handle(request_for(experiment(privacy=DP)).to_record(), home)
    out = tmp_path / "run.zip"
    approve(home, "experiment", "ab" * 32)
    approve(home, "refused", "cd" * 32)
    write_evidence(home, settings, "run", out, epsilon_of)
    text = out.read_bytes().decode("latin-1")
    assert str(home.path) not in text and str(photos) not in text
    assert not any(path.name in text for path in photos.rglob("*.png"))
    assert "fingerprint" not in text
    # The whole digests: four hexadecimal digits turn up by chance among those of a signature.
    assert "ab" * 32 not in text and "cd" * 32 not in text


def test_an_unbounded_total_is_no_number(make_site: MakeSite, tmp_path):
    home, settings = make_site()
    handle(request_for(experiment()).to_record(), home)
    write_evidence(home, settings, "run", tmp_path / "run.zip", epsilon_of)
    (total,) = contents(tmp_path / "run.zip")["spending.json"]["totals"].values()
    assert total["is_unbounded"] is True
    json.loads(json.dumps(total, allow_nan=False))


def test_another_runs_name_and_an_old_file_are_one_line(make_site: MakeSite, tmp_path):
    home, settings = make_site()
    with pytest.raises(InputError, match="nothing of a run 'other'"):
        write_evidence(home, settings, "other", tmp_path / "run.zip", epsilon_of)
    assert list(tmp_path.glob("*.zip")) == []
    (tmp_path / "run.zip").write_bytes(b"mine")
    with pytest.raises(InputError, match="exists: name a new file"):
        write_evidence(home, settings, "run", tmp_path / "run.zip", epsilon_of)
    assert (tmp_path / "run.zip").read_bytes() == b"mine"
