"""What each adversary sends, against arithmetic by hand; and that no real site can be one."""

import json
import os

import numpy as np
import pytest

import client.app
import client.entry
from client.simulated import adversary, app
from client.simulated.adversary import Adversary, adversary_of, poisoned_reply, poisoned_update
from client.simulated.virtual_site import home_of, simulation_folder
from server.federation.fleet.code_bundle import SITES, VIRTUAL_SITES, build_bundle
from shared.messages.packing import decode, encode
from shared.messages.training import ReplyHeader, RequestHeader, TrainReply
from tests.test_imports import CODE, graph

UPDATE = np.array([0.5, -2.0, 0.0, 1e-3], np.float32)
LATER = np.array([3.0, 1.0, -1.0, 7.0], np.float32)


def sent(tmp_path, kind, update=UPDATE, **fields):
    return poisoned_update(Adversary(kind=kind, **fields), update.copy(), tmp_path)


@pytest.mark.parametrize("kind", ["scaled", "implant", "backdoor"])
def test_boosted_updates_are_the_honest_ones_times_the_strength(tmp_path, kind):
    assert sent(tmp_path, kind, strength=9.0).tolist() == pytest.approx([4.5, -18.0, 0.0, 9e-3])


def test_a_sign_flip_points_the_other_way_and_is_as_strong_as_asked(tmp_path):
    assert sent(tmp_path, "sign-flip", strength=2.0).tolist() == pytest.approx([-1.0, 4.0, 0.0, -2e-3])


def test_a_lazy_site_sends_nothing_but_zeros(tmp_path):
    assert sent(tmp_path, "lazy", strength=9.0).tolist() == [0.0, 0.0, 0.0, 0.0]


def test_a_stale_site_sends_its_first_update_in_every_round(tmp_path):
    assert [sent(tmp_path, "stale", update).tolist() for update in (UPDATE, LATER, LATER)] == [UPDATE.tolist()] * 3
    assert (tmp_path / adversary.FIRST_UPDATE).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_reply_keeps_header_and_wire_form(tmp_path, dtype):
    header = ReplyHeader(request_digest="0" * 64, status="trained", num_examples=7)
    found = poisoned_reply(
        Adversary(kind="sign-flip", strength=2.0), TrainReply(header, encode(UPDATE, dtype)), tmp_path
    )
    assert found.header == header and found.update.dtype == encode(UPDATE, dtype).dtype
    assert decode(found.update, dtype).tolist() == pytest.approx([-1.0, 4.0, 0.0, -2e-3], rel=1e-2, abs=2e-2)
    refused = TrainReply(ReplyHeader(request_digest="0" * 64, status="refused", refusal="failed"))
    assert poisoned_reply(Adversary(kind="lazy"), refused, tmp_path) is refused


def test_only_the_sites_that_the_simulations_folder_names_are_adversaries(tmp_path):
    assert adversary_of(tmp_path, "site-3") is None
    (tmp_path / adversary.ADVERSARIES_FILE).write_text(json.dumps({"site-3": {"kind": "lazy", "strength": 2.0}}))
    assert adversary_of(tmp_path, "site-3") == Adversary(kind="lazy", strength=2.0)
    assert adversary_of(tmp_path, "site-2") is None


def test_a_virtual_site_answers_what_its_adversary_makes_of_the_reply(tmp_path, monkeypatch):
    monkeypatch.setenv("MASKFED_SIMULATION", str(tmp_path))
    (tmp_path / adversary.ADVERSARIES_FILE).write_text(json.dumps({"site-1": {"kind": "scaled", "strength": 3.0}}))
    header = ReplyHeader(request_digest="0" * 64, status="trained")
    monkeypatch.setattr(app, "handle", lambda _content, _home: TrainReply(header, UPDATE))
    for alias, factor in (("site-0", 1.0), ("site-1", 3.0)):
        record = app.trained(None, app.Home(tmp_path / "sites" / alias))
        update = TrainReply.from_record(record, len(UPDATE)).update
        assert update.tolist() == pytest.approx((factor * UPDATE).tolist())


def test_no_process_of_a_real_site_can_reach_the_code_of_adversaries():
    """From each program of a site, along every import, late ones included."""
    edges, reached = graph(), set()
    left = ["client.app", "client.entry", "client.cli.main", *(name for name in CODE if name.startswith("deploy."))]
    while left:
        name = left.pop()
        if name not in reached:
            reached.add(name)
            left += edges.get(name, ())
    assert "client.training_request" in reached
    assert not any(name.startswith("client.simulated") for name in reached)


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
def test_a_real_site_runs_its_installed_app_whatever_the_bundle_names():
    assert build_bundle(VIRTUAL_SITES) != build_bundle() == build_bundle(SITES)
    runtime = client.entry.runtime
    before = dict(vars(runtime))
    try:
        client.entry.install_guards(os.getppid())
        load = runtime.get_load_client_app_fn(default_app_ref=VIRTUAL_SITES, app_path="/nowhere")
        assert load("fab", "1.0", "hash") is client.app.app is not app.app
    finally:
        vars(runtime).update(before)


def test_outside_of_a_simulation_the_virtual_app_has_no_home(monkeypatch):
    monkeypatch.delenv("MASKFED_SIMULATION", raising=False)
    with pytest.raises(KeyError):
        simulation_folder()
    with pytest.raises(KeyError):
        home_of({"partition-id": 0})


def test_nothing_of_it_fits_into_a_request_or_an_experiment():
    fields = json.dumps(RequestHeader.model_json_schema())
    assert "max_update_norm" in fields
    assert not any(word in fields for word in ("adversar", "sign-flip", "strength", "implant"))
