"""The operator's commands, from enrolling to leaving."""

import datetime as dt
import json
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import httpx
import pytest
import typer
from typer.testing import CliRunner, Result

from client.cli import confirm_persons
from client.cli import main as cli
from client.data.dataset import open_dataset
from client.home import Home
from client.operator.status import SiteView, hold_site, is_running
from client.policy.approval import read_approved
from client.records import chain
from client.records.chain import read_chain
from client.records.ledger import open_ledger, read_ledger
from client.records.spending import Charge
from client.settings import load_settings, save_settings
from client.training.progress import told
from deploy.checks.connection import Finding
from deploy.errors import ProvisionError
from deploy.identity.enrolment import read_request, write_bundle
from deploy.processes.process import free_ports
from shared.errors import InputError
from shared.storage.code_digest import installed_digest
from tests.client.conftest import DP, SIZE, MakeSite, experiment, request_for
from tests.signing import make_federation


def call(*arguments: object) -> Result:
    """Run a command; errors that `main` turns into one line are raised."""
    result = CliRunner().invoke(cli.app, [str(each) for each in arguments], catch_exceptions=True)
    if isinstance(result.exception, InputError | ProvisionError):
        raise result.exception
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "site"


@pytest.fixture
def bundle(tmp_path: Path, home: Path) -> Path:
    """Enrol the site and get its join bundle from a coordinator that runs the same code."""
    return make_bundle(tmp_path, home, installed_digest())


def make_bundle(folder: Path, home: Path, digest: str) -> Path:
    line = call("enroll", "site0", "--home", home).stdout.strip()
    make_federation(folder)
    write_bundle(folder / "join.json", read_request(line), "127.0.0.1:1", folder / "pki", digest)
    return folder / "join.json"


def join(bundle: Path, home: Path, photos: Path, *more: object) -> Result:
    head = home.parent / "head" / "head.json"
    confirmed = () if "--persons" in more else ("--persons", 6)
    options = ("--image-size", SIZE, "--head-file", head, *confirmed, *more)
    return call("join", bundle, "--home", home, "--data", photos, *options)


def test_site_joins_with_a_policy_that_says_what_it_allows(bundle: Path, home: Path, photos: Path):
    output = join(bundle, home, photos, "--epsilon-cap", 3).stdout
    settings = load_settings(Home(home))
    assert settings.policy.require_dp
    assert settings.policy.experiments == "approved"
    assert settings.policy.epsilon_cap == 3
    assert "training with DP only, at most epsilon 3" in output
    assert read_approved(Home(home)).code == {installed_digest()}
    assert "unbroken" not in output


def test_training_without_dp_needs_an_explicit_word(bundle: Path, home: Path, photos: Path):
    output = join(bundle, home, photos, "--allow-non-private", "--allow-any-experiment").stdout
    assert "TRAINING WITHOUT DP IS ALLOWED" in output
    policy = load_settings(Home(home)).policy
    assert not policy.require_dp
    assert policy.experiments == "any"


def test_joining_other_code_is_refused_and_writes_nothing(tmp_path: Path, home: Path, photos: Path):
    bundle = make_bundle(tmp_path, home, "0" * 64)
    with pytest.raises(InputError, match="install the same version"):
        join(bundle, home, photos)
    assert not Home(home).settings.exists()
    assert not Home(home).approved.exists()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--task", "trian"), r"^--task 'trian': Input should be 'train'"),
        (("--delta", "2.0"), r"^--delta 2\.0: "),
        (("--image-count", "maybe"), r"^--image-count 'maybe': "),
        (("--held-out", "1.5"), r"^--held-out 1\.5: "),
    ],
)
def test_a_wrong_option_of_join_is_named_as_it_was_typed(options, problem, bundle: Path, home: Path, photos: Path):
    with pytest.raises(InputError, match=problem):
        join(bundle, home, photos, *options)
    assert not Home(home).settings.exists()


def test_joining_without_images_is_refused_and_writes_nothing(bundle: Path, home: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no image file"):
        join(bundle, home, tmp_path / "empty")
    assert not Home(home).settings.exists()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--identities", "nowhere.txt"), "identities .*nowhere.txt: not a text file"),
        (("--head-file", "site/kept/head.json"), "outside .*site, the ledger's folder"),
        (("--delta", 1), r"--delta 1.0: Input should be less than or equal to 0.001"),
    ],
)
def test_joining_with_a_bad_option_names_it_and_writes_nothing(
    bundle: Path, home: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[object, ...], problem: str
):
    monkeypatch.chdir(home.parent)
    before = sorted(home.rglob("*"))
    with pytest.raises(InputError, match=problem):
        call("join", bundle, "--home", home, "--data", photos, "--image-size", SIZE, "--persons", 6, *options)
    assert sorted(home.rglob("*")) == before


def test_joining_for_persons_needs_images_sorted_by_person(bundle: Path, home: Path, photos: Path):
    first = next(photos.iterdir())
    options = ("--image-size", SIZE, "--unit", "person")
    with pytest.raises(InputError, match=r"--unit person, but .* is not sorted by person. Give one folder per person"):
        call("join", bundle, "--home", home, "--data", first, *options)
    join(bundle, home, photos, "--unit", "person")


def test_the_unit_is_the_person_where_there_are_folders(bundle: Path, home: Path, photos: Path):
    output = join(bundle, home, photos).stdout
    assert "6 persons, 4 to 4 images each: " in output
    assert load_settings(Home(home)).policy.unit == "person"


def test_the_unit_is_the_image_where_there_are_no_folders(bundle: Path, home: Path, photos: Path):
    call("join", bundle, "--home", home, "--data", next(photos.iterdir()), "--image-size", SIZE)
    assert load_settings(Home(home)).policy.unit == "image"


def test_persons_that_nobody_confirms_are_refused_and_write_nothing(bundle: Path, home: Path, photos: Path):
    before = sorted(home.rglob("*"))
    with pytest.raises(InputError, match=r"nobody is here to confirm .*: add `--persons 6` if they are"):
        call("join", bundle, "--home", home, "--data", photos, "--image-size", SIZE)
    with pytest.raises(InputError, match="--persons 7, but these are 6"):
        join(bundle, home, photos, "--persons", 7)
    assert sorted(home.rglob("*")) == before


@pytest.mark.parametrize(("answer", "is_joined"), [("y", True), ("n", False)])
def test_persons_are_asked_for_at_a_terminal(
    bundle: Path, home: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, answer: str, is_joined: bool
):
    monkeypatch.setattr(confirm_persons, "sys", mock.Mock())
    monkeypatch.setattr(typer, "confirm", lambda text: answer == "y")
    if is_joined:
        call("join", bundle, "--home", home, "--data", photos, "--image-size", SIZE)
    else:
        with pytest.raises(InputError, match="not confirmed"):
            call("join", bundle, "--home", home, "--data", photos, "--image-size", SIZE)
    assert Home(home).settings.exists() == is_joined


def test_scan_asks_again_only_when_persons_have_changed(bundle: Path, home: Path, photos: Path, tmp_path: Path):
    shutil.copytree(photos, tmp_path / "own")
    join(bundle, home, tmp_path / "own")
    assert "data set" in call("data", "scan", "--home", home).stdout
    shutil.copytree(next(photos.iterdir()), tmp_path / "own" / "zz-new")
    with pytest.raises(InputError, match="--persons 7"):
        call("data", "scan", "--home", home)
    call("data", "scan", "--home", home, "--persons", 7)
    call("data", "scan", "--home", home)


def test_tree_of_folders_asks_which_one_is_the_person(bundle: Path, home: Path, photos: Path, tmp_path: Path):
    for number, path in enumerate(sorted(photos.rglob("*.png"))):
        album = tmp_path / "tree" / f"person{number % 3}" / f"album{number % 2}"
        album.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, album)
    before = sorted(home.rglob("*"))
    for options in (("--persons", 3), ("--unit", "image"), ("--persons", 3, "--person-depth", 3)):
        with pytest.raises(InputError, match=r"which folder is the person\?|person_depth 3"):
            join(bundle, home, tmp_path / "tree", *options)
    assert sorted(home.rglob("*")) == before
    join(bundle, home, tmp_path / "tree", "--persons", 3, "--person-depth", 1)
    assert "of 3 persons" in call("data", "scan", "--home", home).stdout


def test_charges_of_another_home_are_shown_as_such(make_site: MakeSite, tmp_path: Path):
    home, settings = make_site()
    data = open_dataset(home, SIZE)
    charge = Charge(
        dataset_id=data.dataset_id, fingerprint=data.fingerprint, task="train", run="run", server_round=1,
        request_digest="r", plan_digest="p", mechanism="none",
    )  # fmt: skip
    with open_ledger(home.ledger, Path(settings.head_file)) as ledger:
        ledger.commit(ledger.reserve(charge, cap=1.0, delta=1e-5, epsilon_of=lambda history, delta: 0.0)[0])
    other = Home(tmp_path / "other")
    other.path.mkdir(mode=0o700)
    save_settings(other, settings.model_copy(update={"head_file": str(tmp_path / "other-head" / "head.json")}))
    scanned = call("data", "scan", "--home", other.path).stdout
    assert f"shares files with {home.path}" in scanned
    shown = call("ledger", "show", "--home", other.path).stdout
    assert "train run round 1: without DP  in another home, on shared images" in shown
    assert "NOT COMPLETED" not in shown
    assert json.loads(call("ledger", "show", "--json", "--home", other.path).stdout)["charges"][0]["inherited"]


def test_doctor_says_whose_homes_are_linked(make_site: MakeSite, tmp_path: Path):
    home = make_site()[0].path
    assert "1 homes; homes of OTHER USERS are not linked" in call("doctor", "--home", home).stdout
    (tmp_path / "registry").chmod(0o2770)
    assert "1 homes of this machine see each other's images and spending" in call("doctor", "--home", home).stdout
    (tmp_path / "registry").chmod(0o777)
    assert "FAIL registry" in call("doctor", "--home", home).stdout


def test_ledger_that_is_dated_ahead_is_accepted_by_the_operators_word(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
):
    home = make_site()[0].path
    with pytest.raises(InputError, match="nothing to accept"):
        call("ledger", "accept-clock", "--home", home)
    ahead = dt.datetime.now(dt.UTC) + dt.timedelta(days=400)
    with monkeypatch.context() as patch:
        patch.setattr(chain.dt, "datetime", mock.Mock(wraps=dt.datetime, now=lambda zone: ahead))
        call("data", "scan", "--new", "--home", home)
    assert "FAIL ledger clock" in call("doctor", "--home", home).stdout
    assert "1 entries dated ahead" in call("ledger", "accept-clock", "--home", home).stdout
    assert "ok   ledger clock" in call("doctor", "--home", home).stdout


def test_joining_without_keys_writes_nothing(bundle: Path, home: Path, photos: Path):
    other = home.parent / "other"
    with pytest.raises(ProvisionError, match="lacks a key"):
        join(bundle, other, photos)
    assert not other.exists()


def test_joining_twice_is_refused(bundle: Path, home: Path, photos: Path):
    join(bundle, home, photos)
    with pytest.raises(InputError, match="exists already"):
        join(bundle, home, photos)


def test_wrong_policy_value_is_named(bundle: Path, home: Path, photos: Path):
    with pytest.raises(InputError, match="unit"):
        join(bundle, home, photos, "--unit", "hospital")


def test_first_day_until_doctor(bundle: Path, home: Path, photos: Path):
    join(bundle, home, photos, "--epsilon-cap", 3)
    before = call("doctor", "--home", home)
    assert before.exit_code == 1
    assert "FAIL data set: no images of 16 pixels are scanned: run `maskfed-client data scan`" in before.stdout
    scanned = call("data", "scan", "--home", home).stdout
    assert "images to train on at 16 x 16 pixels" in scanned
    after = call("doctor", "--home", home).stdout.splitlines()
    failed = [line for line in after if line.startswith("FAIL")]
    assert len(failed) == 1
    assert "door: 127.0.0.1:1 cannot be reached" in failed[0]
    assert "unbroken" in call("ledger", "verify", "--home", home).stdout
    assert "nothing has been charged yet" in call("ledger", "show", "--home", home).stdout
    assert "3 entries" not in call("journal", "verify", "--home", home).stdout
    status = call("status", "--home", home).stdout
    assert "not running" in status
    assert "epsilon 0.000" in status


def test_ledger_is_shown_with_unit_delta_and_open_charges(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch):
    from client.privacy import planning
    from client.training import local_round
    from client.training_request import handle

    place, _ = make_site()
    handle(request_for(experiment(privacy=DP)).to_record(), place)
    monkeypatch.setattr(local_round.Round, "run", lambda _: 1 / 0)
    handle(request_for(experiment(privacy=DP), 2).to_record(), place)
    shown = call("ledger", "show", "--home", place.path).stdout
    assert "train run round 1: sigma 1, q 0.2, 2 steps, per image\n" in shown
    assert "round 2: sigma 1, q 0.2, 2 steps, per image  NOT COMPLETED, counts as spent" in shown
    assert "at delta 1e-05 per image, cap 10" in shown
    tree = json.loads(call("ledger", "show", "--json", "--home", place.path).stdout)
    assert len(tree["charges"]) == 2
    assert len(tree["committed"]) == 1
    (total,) = tree["totals"].values()
    assert total["num_uncommitted"] == 1
    assert total["unit"] == "image"
    plan = place.path / "plan.toml"
    plan.write_text(experiment(privacy={**DP, "noise_multiplier": 2.0}).to_toml())
    command = ("ledger", "plan", plan, "--home", place.path, "--probe-seconds", "0.1")
    planned = call(*command).stdout
    assert "rounds that fit under the cap: 3 of 3" in planned
    assert "per image, cap 10" in planned
    assert "refuses" not in planned
    assert "noise multiplier at which all 3 rounds fit" in planned
    monkeypatch.setattr(planning, "MOST_NOISE", 1.0)
    longer = call(*command, "--set", "federation.local_steps=101").stdout
    assert "refuses it: too_many_steps, 101 steps per round, the site allows 100" in longer
    assert "noise multiplier at which all 3 rounds fit: none; fewer rounds" in longer


def test_plan_without_dp_is_refused(make_site: MakeSite):
    place, _ = make_site()
    plan = place.path / "plan.toml"
    plan.write_text(experiment().to_toml())
    with pytest.raises(InputError, match="unbounded"):
        call("ledger", "plan", plan, "--home", place.path)


def test_waiting_experiment_is_approved_by_the_beginning_of_its_digest(make_site: MakeSite):
    from client.training_request import handle

    place, _ = make_site(experiments="approved")
    handle(request_for(experiment(privacy=DP)).to_record(), place)
    listed = call("approve", "list", "--probe-seconds", "0", "--home", place.path).stdout
    digest = listed.split("waiting 1: experiment ")[1].split()[0]
    assert "is NOT approved" in listed
    call("approve", "experiment", digest[:8], "--home", place.path)
    assert read_approved(place).experiments == {digest}
    call("approve", "revoke", digest, "--home", place.path)
    assert read_approved(place).experiments == frozenset()
    with pytest.raises(InputError, match="not approved"):
        call("approve", "revoke", digest, "--home", place.path)


def test_a_roster_that_waits_is_shown_with_its_keys_and_approved_site_by_site(make_site: MakeSite):
    from client.secure.rosters import answer_keys
    from shared.messages.secure_sum.key_question import KeysQuery, keys_record, read_keys_answer
    from shared.secure_aggregation.roster import Peer
    from tests.signing import public_of

    place, settings = make_site()
    peers = tuple(Peer(alias=alias, signing_key=public_of(alias)) for alias in ("site-1", "site-2", settings.alias))
    question = keys_record(KeysQuery(run="masked", peers=peers))
    assert read_keys_answer(answer_keys(question, place)).refusal == "roster_not_approved"
    listed = call("approve", "list", "--probe-seconds", "0", "--home", place.path).stdout
    assert "maskfed-client approve roster masked" in listed
    shown = call("approve", "roster", "masked", "--yes", "--home", place.path).stdout
    assert all(peer.signing_key in shown for peer in peers) and "(this site)" in shown
    assert read_approved(place).peers == {peer.digest for peer in peers}
    assert read_keys_answer(answer_keys(question, place)).status == "accepted"
    with pytest.raises(InputError, match="waiting are none"):
        call("approve", "roster", "masked", "--yes", "--home", place.path)


def test_approving_code_shows_what_changed(make_site: MakeSite):
    place, _ = make_site()
    assert "added client/entry.py" in call("approve", "code", "--yes", "--home", place.path).stdout
    assert "no file has changed" in call("approve", "code", "--yes", "--home", place.path).stdout
    record = place.path / "approved-files.json"
    files = json.loads(record.read_bytes())
    files["client/app.py"] = "0"
    files["client/gone.py"] = "0"
    record.write_text(json.dumps(files))
    shown = call("approve", "code", "--yes", "--home", place.path).stdout
    assert "changed client/app.py" in shown
    assert "removed client/gone.py" in shown


def test_leaving_closes_the_policy_and_keeps_the_records(bundle: Path, home: Path, photos: Path):
    join(bundle, home, photos, "--allow-any-experiment")
    call("data", "scan", "--home", home)
    place = Home(home)
    for made_of_images in (place.replies, place.kept):
        (made_of_images / "run").mkdir(parents=True)
    call("leave", "--yes", "--home", home)
    assert not place.replies.exists() and not place.kept.exists()
    assert load_settings(place).policy.tasks == ()
    assert not (home / "node.key").exists()
    assert read_ledger(place.ledger).entries
    assert read_chain(place.journal)[-1].kind == "left"


def test_running_site_cannot_leave_or_start_twice(make_site: MakeSite):
    place, _ = make_site()
    assert not is_running(place)
    place.path.chmod(0o700)
    with hold_site(place):
        assert is_running(place)
        with pytest.raises(InputError, match="running already"):
            call("leave", "--yes", "--home", place.path)
        with pytest.raises(InputError, match="running already"):
            call("start", "--home", place.path)
    assert not is_running(place)


def test_view_prints_each_new_event_once(make_site: MakeSite):
    from client.records.journal import Journal

    place, _ = make_site()
    lines: list[str] = []
    view = SiteView(place, lines.append)
    view.show_new()
    Journal(place.journal).write("approval", what="code", digest="a" * 64)
    view.show_new()
    view.show_new()
    assert len(lines) == 1
    assert "approval" in lines[0]
    assert "a" * 13 not in lines[0], "digests are cut for people"


def test_view_without_a_terminal_has_a_line_for_each_tenth_of_a_round(make_site: MakeSite):
    place, _ = make_site()
    lines: list[str] = []
    view = SiteView(place, lines.append)
    view.show_lines()
    with told(place, "run", 3, 40) as tell:
        for step in (1, 2, 4, 5, 20):
            tell(step)
            view.show_lines()
    view.show_lines()
    with told(place, "run", 4, 40):
        view.show_lines()
    steps = [line.removeprefix("  training: run run ") for line in lines]
    assert steps == [f"round 3, step {step} of 40" for step in (1, 4, 20)] + ["round 4, step 0 of 40"]


def test_site_with_an_outdated_ledger_or_a_damaged_journal_does_not_start(make_site: MakeSite):
    from client.training_request import handle

    place, _ = make_site()
    place.path.chmod(0o700)
    old = place.ledger.read_bytes()
    handle(request_for(experiment()).to_record(), place)
    new = place.ledger.read_bytes()
    place.ledger.write_bytes(old)
    with pytest.raises(InputError, match=r"2 entries, one of 4 was seen: it is an older copy"):
        call("start", "--home", place.path)
    place.ledger.write_bytes(new)
    place.journal.write_bytes(place.journal.read_bytes().replace(b"release", b"release_"))
    with pytest.raises(InputError, match=r"journal.jsonl: line 2 is damaged"):
        call("start", "--home", place.path)


def test_events_are_lines_for_people_with_the_cure(make_site: MakeSite):
    from client.training_request import handle

    place, _ = make_site()
    handle(request_for(experiment(privacy=DP)).to_record(), place)
    handle(request_for(experiment(), 2).to_record(), place)
    (place.datasets / "current").unlink()
    handle(request_for(experiment(), 3, run="other").to_record(), place)
    shown = [line[20:] for line in call("journal", "show", "--home", place.path).stdout.splitlines()]
    assert shown[0].startswith("request: task train, run run, server_round 1, request_digest ")
    assert shown[1].startswith(
        "released 0.4 MB: update, num_examples, epsilon, delta, is_unbounded, epsilon_cap, unit, ledger head; "
        "spent: epsilon "
    )
    assert shown[3].startswith("REFUSED (plan_changed): the request differs from the plan that this run began with;")
    assert shown[5].startswith(
        "REFUSED (data_not_ready): the site's images are not scanned; see `maskfed-client doctor`;"
    )


@pytest.mark.parametrize(
    ("name", "mode", "cure"),
    [(".", 0o755, "chmod 700"), ("data.key", 0o640, "chmod 600"), ("ledger.jsonl", 0o604, "chmod 600")],
)
def test_site_with_open_private_files_does_not_start(make_site: MakeSite, name: str, mode: int, cure: str):
    place, _ = make_site()
    place.path.chmod(0o700)
    (place.path / name).chmod(mode)
    with pytest.raises(InputError, match=f"has mode {mode:04o}.*{cure}"):
        call("start", "--home", place.path)


@pytest.mark.parametrize(
    ("name", "text"),
    [("clock", "this clock is 700 s ahead of the coordinator's"), ("TLS", "the certificate at 127.0.0.1:1 is refused")],
)
def test_site_whose_way_to_the_coordinator_is_wrong_does_not_start(
    bundle: Path, home: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str
):
    join(bundle, home, photos)
    monkeypatch.setattr("deploy.checks.connection.door_checks", lambda *_: [Finding(name, False, text)])
    with pytest.raises(ProvisionError, match=text):
        call("start", "--home", home)
    assert not is_running(Home(home))


def test_start_tells_that_installed_code_is_not_approved(
    bundle: Path, home: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
):
    join(bundle, home, photos)
    monkeypatch.setattr("deploy.checks.connection.door_checks", lambda *_: [Finding("TLS", False, "refused")])
    told: list[str] = []
    monkeypatch.setattr("client.cli.site.tell", told.append)
    with pytest.raises(ProvisionError):
        call("start", "--home", home)
    assert told == []
    monkeypatch.setattr("client.operator.doctor.installed_digest", lambda: "0" * 64)
    with pytest.raises(ProvisionError):
        call("start", "--home", home)
    assert len(told) == 1
    assert "code 000000000000 is not approved: `maskfed-client approve code`" in told[0]


def test_figures_are_served_until_the_operator_stops_them(bundle: Path, home: Path, photos: Path):
    join(bundle, home, photos)
    port = free_ports(1)[0]
    argv = [sys.executable, "-c", "from client.cli.main import main; main()", "metrics", "--home", str(home)]
    with subprocess.Popen([*argv, "--port", str(port)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert f"127.0.0.1:{port}/metrics" in process.stdout.readline()
        text = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
        process.terminate()
    assert 'maskfed_site_epsilon_cap{site="site0"} 8' in text.splitlines()
    assert process.returncode == 0


def test_errors_are_one_line_and_exit_code_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr("sys.argv", ["maskfed-client", "status", "--home", str(tmp_path)])
    monkeypatch.setattr("os.umask", lambda _: 0)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
